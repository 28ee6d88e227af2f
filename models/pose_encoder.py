"""Camera pose auto-encoders (Shavit & Keller, ECCV 2022, arXiv 2207.05530, section 3): poses into an APR's latents."""
import torch
import torch.nn.functional as F
from torch import nn

OCTAVES = 6
FOURIER_FEATURES = 2 * OCTAVES + 1  # of one number


def fourier_features(values):
    """v, sin(2^0 v), cos(2^0 v), sin(2^1 v), ...: N x D -> N x 13 D (Mildenhall et al., ECCV 2020, eq. 4, without pi)."""
    angles = values.unsqueeze(1) * 2.0 ** torch.arange(OCTAVES, device=values.device).unsqueeze(1)
    return torch.cat((values, torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)), dim=1)


class _PoseEncoder(nn.Module):
    """What both PAEs share: two MLPs and the version of the file.

    A file of ours (state-dict version 2) encodes the normalised quaternion. A published one (version 1 or none) was
    trained on the APR's raw estimate, and gets what it is given.
    """

    _version = 2

    def __init__(self, x_dim, q_dim, encoder_dim, shallow_mlp):
        super().__init__()
        hidden = (64,) if shallow_mlp else (64, 128, 256)
        self.x_encoder = _mlp(x_dim, *hidden, encoder_dim)
        self.q_encoder = _mlp(q_dim, *hidden, encoder_dim)

    @property
    def takes_unit_quaternions(self):
        return self._version >= 2

    def inputs(self, pose):
        """Position and orientation as this PAE was trained to see them: N x 7 -> N x 3, N x 4."""
        position, orientation = pose[:, :3], pose[:, 3:]
        return position, F.normalize(orientation, dim=1) if self.takes_unit_quaternions else orientation

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # On the instance, so that saving a published PAE again keeps saying what it is.
        self._version = local_metadata.get("version") or 1
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class PoseEncoder(_PoseEncoder):
    """PAE of a single-scene APR. forward(pose N x 7) -> latent_x, latent_q, N x encoder_dim each; a scene is ignored.

    apply_positional_encoding: give the MLPs Fourier features instead of the pose itself.
    shallow_mlp: one hidden layer instead of three.
    """

    def __init__(self, encoder_dim, apply_positional_encoding=True, shallow_mlp=False):
        n_features = FOURIER_FEATURES if apply_positional_encoding else 1
        super().__init__(3 * n_features, 4 * n_features, encoder_dim, shallow_mlp)
        self.apply_positional_encoding = apply_positional_encoding

    def forward(self, pose, scene=None):
        position, orientation = self.inputs(pose)
        if self.apply_positional_encoding:
            position, orientation = fourier_features(position), fourier_features(orientation)
        return self.x_encoder(position), self.q_encoder(orientation)


class MultiScenePoseEncoder(_PoseEncoder):
    """PAE of a multi-scene APR. forward(pose N x 7, scene index N or N x 1) -> latent_x, latent_q, N x encoder_dim."""

    def __init__(self, encoder_dim, shallow_mlp=False):
        super().__init__(4 * FOURIER_FEATURES, 5 * FOURIER_FEATURES, encoder_dim, shallow_mlp)

    def forward(self, pose, scene):
        position, orientation = self.inputs(pose)
        scene = fourier_features(scene.reshape(-1, 1).to(pose.dtype))
        return (self.x_encoder(torch.cat((fourier_features(position), scene), dim=1)),
                self.q_encoder(torch.cat((fourier_features(orientation), scene), dim=1)))


def _mlp(*dims):
    """Linear layers with ReLU between them, Xavier uniform."""
    layers = []
    for in_dim, out_dim in zip(dims, dims[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])
