"""Camera pose auto-encoders (Shavit & Keller, ECCV 2022, arXiv 2207.05530, section 3): poses into an APR's latents."""
import torch
import torch.nn.functional as F
from torch import nn

from util.rotations import mean_quaternion, on_side_of

OCTAVES = 6  # of published PAEs


def fourier_features(values, octaves=OCTAVES):
    """v, sin(2^0 v), cos(2^0 v), sin(2^1 v), ...: N x D -> N x (2 octaves + 1) D (Mildenhall et al., ECCV 2020, eq. 4,
    without pi)."""
    angles = values.unsqueeze(1) * 2.0 ** torch.arange(octaves, device=values.device, dtype=values.dtype).unsqueeze(1)
    return torch.cat((values, torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)), dim=1)


class _PoseEncoder(nn.Module):
    """What both PAEs share: two MLPs, how poses come to them, and the version of the file.

    A file of ours (state-dict version 3) holds, per scene, the centre and the scale of the training positions and the mean
    orientation: positions are encoded relative to them, quaternions as units of the mean's sign. It also holds
    `noise`, the covariance of the APR's latents (position's, then orientation's) around the encodings of their frames'
    poses, 2 encoder_dim x 2 encoder_dim; and `apr`, the fingerprint of that APR. Version 2, without these, encodes the unit quaternion and the position in metres. A
    published PAE (version 1 or none) was trained on the APR's raw estimate, and gets what it is given.
    """

    _version = 3

    def __init__(self, x_dim, q_dim, encoder_dim, shallow_mlp, num_scenes=1):
        super().__init__()
        hidden = (64,) if shallow_mlp else (64, 128, 256)
        self.x_encoder = _mlp(x_dim, *hidden, encoder_dim)
        self.q_encoder = _mlp(q_dim, *hidden, encoder_dim)
        self.register_buffer("centre", torch.zeros(num_scenes, 3))
        self.register_buffer("scale", torch.ones(num_scenes))
        self.register_buffer("mean_orientation", torch.zeros(num_scenes, 4))
        self.register_buffer("noise", torch.zeros(2 * encoder_dim, 2 * encoder_dim))
        self.register_buffer("apr", torch.zeros(16, dtype=torch.uint8))  # unknown

    @property
    def takes_unit_quaternions(self):
        return self._version >= 2

    def fit_poses(self, poses, scenes):
        """Take centre, scale and mean orientation of the training poses, N x 7, of scenes, N: as the APR tells them, and so as
        the PAE will be asked; medians, because a few are told wrong, and label files have outliers."""
        for scene in scenes.unique():
            of_scene = poses[scenes == scene].double()
            self.centre[scene] = of_scene[:, :3].median(dim=0).values
            spread = (of_scene[:, :3] - self.centre[scene]).norm(dim=1).median()
            self.scale[scene] = spread if spread > 0 else 1  # a single position keeps metres
            self.mean_orientation[scene] = mean_quaternion(of_scene[:, 3:])

    @torch.no_grad()
    def fit_noise(self, poses, scenes, latents):
        """Take the covariance of latents, N x 2 encoder_dim, around the encodings of their frames' poses."""
        residuals = latents - torch.cat(self(poses, scenes), dim=1)
        self.noise.copy_(residuals.T @ residuals / len(residuals))

    def inputs(self, pose, scene):
        """Position and orientation as this PAE was trained to see them: N x 7, N scene indices -> N x 3, N x 4."""
        position, orientation = pose[:, :3], pose[:, 3:]
        if not self.takes_unit_quaternions:
            return position, orientation
        position = (position - self.centre[scene]) / self.scale[scene].unsqueeze(1)
        return position, on_side_of(F.normalize(orientation, dim=1), self.mean_orientation[scene])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # On the instance, so that saving a published PAE again keeps saying what it is.
        self._version = local_metadata.get("version") or (3 if f"{prefix}centre" in state_dict else 1)
        for name, buffer in self.named_buffers():
            if self._version < 3 or name == "apr":  # which earlier files of version 3 lack
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class PoseEncoder(_PoseEncoder):
    """PAE of a single-scene APR. forward(pose N x 7) -> latent_x, latent_q, N x encoder_dim each; a scene is ignored.

    apply_positional_encoding: give the MLPs Fourier features, of so many octaves, instead of the pose itself.
    shallow_mlp: one hidden layer instead of three.
    """

    def __init__(self, encoder_dim, apply_positional_encoding=True, shallow_mlp=False, octaves=OCTAVES):
        self.octaves = octaves if apply_positional_encoding else 0
        n_features = 2 * self.octaves + 1  # of one number
        super().__init__(3 * n_features, 4 * n_features, encoder_dim, shallow_mlp)

    def forward(self, pose, scene=None):
        position, orientation = self.inputs(pose, torch.zeros(len(pose), dtype=torch.long, device=pose.device))
        return self.x_encoder(fourier_features(position, self.octaves)), self.q_encoder(fourier_features(orientation, self.octaves))


class MultiScenePoseEncoder(_PoseEncoder):
    """PAE of a multi-scene APR. forward(pose N x 7, scene index N or N x 1) -> latent_x, latent_q, N x encoder_dim."""

    def __init__(self, encoder_dim, num_scenes, shallow_mlp=False, octaves=OCTAVES):
        self.octaves = octaves
        n_features = 2 * octaves + 1
        super().__init__(4 * n_features, 5 * n_features, encoder_dim, shallow_mlp, num_scenes)

    def forward(self, pose, scene):
        scene = scene.reshape(-1).long()
        parts = (*self.inputs(pose, scene), scene.unsqueeze(1).to(pose.dtype))
        position, orientation, scene = (fourier_features(part, self.octaves) for part in parts)
        return self.x_encoder(torch.cat((position, scene), dim=1)), self.q_encoder(torch.cat((orientation, scene), dim=1))


def _mlp(*dims):
    """Linear layers with ReLU between them, Xavier uniform."""
    layers = []
    for in_dim, out_dim in zip(dims, dims[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])
