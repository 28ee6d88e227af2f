"""iAPR: iterative refinement of an APR's pose by a transformer over image and encoded pose.

It is from a later release of the PAEs' authors. A checkpoint holds its own MS-Transformer and PAE. The APR under test
gives the first pose and the scene.
"""
import torch
from torch import nn

from models.ms_transformer import EMSTransPoseNet, PoseRegressor
from models.pose_encoder import MultiScenePoseEncoder
from util.rotations import conjugate, multiply_quaternions, unit_poses

_LAYERS, _HEADS, _FEED_FORWARD = 2, 4, 2048


class IAPR(nn.Module):
    """forward(image N x 3 x H x W, scene N, pose N x 7) -> relative pose N x 7, from the image to the encoded pose.

    The state dict has the published keys and shapes.
    """

    def __init__(self, config, backbone_path="none"):
        super().__init__()
        dim = config["hidden_dim"]
        self.mstransformer = EMSTransPoseNet(config, backbone_path)
        self.pae = PublishedEncoder(dim, config["num_scenes"])
        self.rel_x_token, self.rel_q_token = (nn.Parameter(torch.zeros(1, dim)) for _ in range(2))
        layer = nn.TransformerEncoderLayer(dim, _HEADS, _FEED_FORWARD, activation="gelu", batch_first=True)
        self.rpr_transformer_encoder = nn.TransformerEncoder(layer, _LAYERS, nn.LayerNorm(dim),
                                                             enable_nested_tensor=False)
        self.ln = nn.LayerNorm(dim)
        self.rel_regressor_x, self.rel_regressor_q = PoseRegressor(dim, 3), PoseRegressor(dim, 4)
        for parameter in self.rpr_transformer_encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    def precision(self):
        """What the networks compute in, as the APRs' `precision`."""
        return self.mstransformer.precision

    @precision.setter
    def precision(self, precision):
        self.mstransformer.precision = precision

    def forward(self, image, scene, pose):
        return self.relative(self.image_latents(image, scene), scene, pose)

    def image_latents(self, image, scene):
        """The image's latents of the given scenes: N x 2 x hidden_dim."""
        latents = self.mstransformer.forward_transformers({"img": image, "scene": scene})
        return torch.stack((latents["latent_x"], latents["latent_q"]), dim=1)

    def relative(self, latents, scene, pose):
        """The relative pose from the image to poses with unit quaternions: N x 7. latents: of `image_latents`."""
        encoded = torch.stack(self.pae(pose, scene), dim=1)
        tokens = torch.stack((self.rel_x_token, self.rel_q_token), dim=1).expand(len(pose), -1, -1)
        sequence = self.rpr_transformer_encoder(torch.cat((tokens, latents, encoded), dim=1))
        found = self.ln(sequence[:, :2])
        return torch.cat((self.rel_regressor_x(found[:, 0]), self.rel_regressor_q(found[:, 1])), dim=1)

    def refine(self, image, scene, pose, n_iterations):
        """Refine poses: N x 7 -> N x 7 with unit quaternions. The image runs through the network once."""
        latents = self.image_latents(image, scene)
        pose = unit_poses(pose)
        for _ in range(n_iterations):
            pose = moved_back(pose, self.relative(latents, scene, pose))
        return pose


class PublishedEncoder(MultiScenePoseEncoder):
    """A PAE as iAPR's checkpoints hold it: weights alone, for poses in metres with quaternions as they are."""

    def __init__(self, encoder_dim, num_scenes):
        super().__init__(encoder_dim, num_scenes)
        self._version = 1
        del self.memory
        for name, _ in [*self.named_buffers()]:
            delattr(self, name)

    def _load_from_state_dict(self, *args):
        nn.Module._load_from_state_dict(self, *args)


def moved_back(pose, relative):
    """Return the poses of images, from poses and the relative poses from the images to these: N x 7, N x 7 -> N x 7.

    The new position is the old one minus the relative; the new orientation is the old one times the conjugate of the
    relative, with a positive scalar, as published: the encoder tells the signs of a quaternion apart.
    """
    orientation = multiply_quaternions(pose[:, 3:], conjugate(unit_poses(relative)[:, 3:]))
    orientation = torch.where(orientation[:, :1] < 0, -orientation, orientation)
    return torch.cat((pose[:, :3] - relative[:, :3], orientation), dim=1)


def relative_pose(pose, other):
    """Return the relative pose from one pose to another: the inverse of `moved_back`. N x 7, N x 7 -> N x 7, unit."""
    turn = multiply_quaternions(conjugate(unit_poses(pose)[:, 3:]), unit_poses(other)[:, 3:])
    return torch.cat((other[:, :3] - pose[:, :3], turn), dim=1)
