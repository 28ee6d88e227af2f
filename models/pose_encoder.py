"""Camera pose auto-encoders (PAEs): MLPs that encode a pose into the latents that an APR computes from its image.

Shavit & Keller, ECCV 2022, arXiv 2207.05530, section 3.
"""
import logging

import torch
import torch.nn.functional as F
from torch import nn

from models.latent_memory import LatentMemory
from util.config import DEFAULTS
from util.rotations import mean_quaternion, on_side_of

OCTAVES = DEFAULTS["octaves"]  # of published PAEs
_FAR = 10  # median distances from a scene's median position, as in datasets.labels: what is further is an error


def fourier_features(values, octaves=OCTAVES):
    """Return v, sin(2^0 v), cos(2^0 v), sin(2^1 v), ... of values v: N x D -> N x (2 octaves + 1) D.

    Mildenhall et al., ECCV 2020, eq. 4, without pi.
    """
    angles = values.unsqueeze(1) * 2.0 ** torch.arange(octaves, device=values.device, dtype=values.dtype).unsqueeze(1)
    return torch.cat((values, torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)), dim=1)


class _PoseEncoder(nn.Module):
    """What both PAEs share: two MLPs, how poses are prepared for them, and the versions of their files.

    The version of a PAE's file says which poses the PAE was trained on:

    3 (ours): positions relative to the scene's centre and scale, unit quaternions with the sign nearer to the scene's
      mean orientation. Beside these three, the file holds `noise` (2 encoder_dim x 2 encoder_dim), the covariance of
      the APR's latents (position's, then orientation's) around the encodings of their frames' poses, `memory`, and
      `apr`, the fingerprint of that APR.
    2 (ours, earlier): positions in metres, unit quaternions.
    1 or none (published): the APR's raw estimate, whose quaternion is not normalised.
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
        self.register_buffer("apr", torch.zeros(16, dtype=torch.uint8))  # zeros: unknown
        self.memory = LatentMemory(2 * encoder_dim, num_scenes)

    @property
    def takes_unit_quaternions(self):
        """Whether the PAE was trained on unit quaternions. A published one was trained on raw estimates."""
        return self._version >= 2

    def fit_poses(self, poses, scenes):
        """Set every scene's centre, scale and mean orientation.

        poses: N x 7, the true training poses. scenes: N, the scene indices that the APR estimates, as in tests.
        Centre and scale are medians, because label files have outliers, and because a few estimated scenes are wrong.
        """
        for scene in scenes.unique():
            of_scene = poses[scenes == scene].double()
            self.centre[scene] = of_scene[:, :3].median(dim=0).values
            spread = (of_scene[:, :3] - self.centre[scene]).norm(dim=1).median()
            self.scale[scene] = spread if spread > 0 else 1  # if all positions are the same, they stay in metres
            self.mean_orientation[scene] = mean_quaternion(of_scene[:, 3:])

    @torch.no_grad()
    def fit_latents(self, frames):
        """Set `noise` to the covariance of latents around the encodings of their frames' poses, and fit the memory.

        frames: as for LatentMemory.fit. Those whose position is far outside its scene's are left out.
        """
        plausible = _plausible(frames)
        frames = {key: rows[plausible] for key, rows in frames.items()}
        residuals = frames["latents"] - torch.cat(self(frames["truth"], frames["scene"]), dim=1)
        self.noise.copy_(residuals.T @ residuals / len(residuals))
        self.memory.fit(self, frames)

    def inputs(self, pose, scene):
        """Return positions and quaternions as this PAE was trained on them: N x 7, N scene indices -> N x 3, N x 4."""
        position, orientation = pose[:, :3], pose[:, 3:]
        if not self.takes_unit_quaternions:
            return position, orientation
        position = (position - self.centre[scene]) / self.scale[scene].unsqueeze(1)
        return position, on_side_of(F.normalize(orientation, dim=1), self.mean_orientation[scene])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        # Set on the instance, so that a published PAE that is saved again keeps its version.
        self._version = local_metadata.get("version") or (3 if f"{prefix}centre" in state_dict else 1)
        for name, buffer in self.named_buffers(recurse=False):
            if self._version < 3 or name == "apr":  # earlier files of version 3 lack `apr`
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class PoseEncoder(_PoseEncoder):
    """PAE of a single-scene APR. forward(pose N x 7) -> latent_x, latent_q, N x encoder_dim each.

    apply_positional_encoding: whether the MLPs take Fourier features of the pose, of `octaves` octaves, or the pose.
    shallow_mlp: one hidden layer instead of three.

    forward ignores its second argument, a scene, so that both PAEs are called alike.
    """

    def __init__(self, encoder_dim, apply_positional_encoding=True, shallow_mlp=False, octaves=OCTAVES):
        self.octaves = octaves if apply_positional_encoding else 0
        n_features = 2 * self.octaves + 1  # per number
        super().__init__(3 * n_features, 4 * n_features, encoder_dim, shallow_mlp)

    def forward(self, pose, scene=None):
        parts = self.inputs(pose, torch.zeros(pose.shape[0], dtype=torch.long, device=pose.device))
        position, orientation = (fourier_features(part, self.octaves) for part in parts)
        return self.x_encoder(position), self.q_encoder(orientation)


class MultiScenePoseEncoder(_PoseEncoder):
    """PAE of a multi-scene APR.

    forward(pose N x 7, scene index N or N x 1) -> latent_x, latent_q, N x encoder_dim each. The MLPs take the Fourier
    features of the pose, then those of the scene index.
    """

    def __init__(self, encoder_dim, num_scenes, shallow_mlp=False, octaves=OCTAVES):
        self.octaves = octaves
        n_features = 2 * octaves + 1
        super().__init__(4 * n_features, 5 * n_features, encoder_dim, shallow_mlp, num_scenes)

    def forward(self, pose, scene):
        scene = scene.reshape(-1).long()
        parts = (*self.inputs(pose, scene), scene.unsqueeze(1).to(pose.dtype))
        position, orientation, scene = (fourier_features(part, self.octaves) for part in parts)
        return (self.x_encoder(torch.cat((position, scene), dim=1)),
                self.q_encoder(torch.cat((orientation, scene), dim=1)))


def _plausible(frames):
    """Which frames have a true position within _FAR median distances from their scene's median: N."""
    plausible = torch.ones_like(frames["scene"], dtype=torch.bool)
    for scene in frames["scene"].unique():
        rows = frames["scene"] == scene
        positions = frames["truth"][rows, :3]
        distances = (positions - positions.median(dim=0).values).norm(dim=1)
        if distances.median() > 0:  # otherwise most frames are in one place, which says nothing about the others
            plausible[rows] = distances <= _FAR * distances.median()
    if not plausible.all():
        logging.info("Left out of the PAE's noise and memory: %d of %d frames, with positions far outside the rest",
                     (~plausible).sum(), len(plausible))
    return plausible


def _mlp(*dims):
    """Return linear layers of these sizes with ReLU between them, initialised Xavier uniform."""
    layers = []
    for in_dim, out_dim in zip(dims, dims[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])
