"""A small learned refiner: from what the APR saw and what a PAE expects at a reference pose to the correction between.

The published refiner cannot run (it declares 512 inputs and is given 1024); this one keeps its idea.
"""
import torch
import torch.nn.functional as F
from torch import nn


class PoseRefiner(nn.Module):
    """forward(query_latents N x 2 latent_dim, reference_latents N x 2 latent_dim, reference_pose N x 7) -> pose N x 7.

    Latents are position and orientation concatenated; the query's are the APR's, the reference's the PAE's. The network
    regresses the translation from the reference to the query and the rotation that is applied after the reference's;
    untrained, it returns the reference. The pose's quaternion is unit, scalar first.
    """

    def __init__(self, latent_dim):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(4 * latent_dim, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.x_reg = nn.Linear(256, 3)
        self.q_reg = nn.Linear(256, 4)
        for linear in (self.hidden[0], self.hidden[2]):
            nn.init.xavier_uniform_(linear.weight)
        for parameter in (*self.x_reg.parameters(), *self.q_reg.parameters()):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.q_reg.bias[:1])

    def forward(self, query_latents, reference_latents, reference_pose):
        hidden = self.hidden(torch.cat((query_latents, reference_latents), dim=1))
        position = reference_pose[:, :3] + self.x_reg(hidden)
        orientation = multiply_quaternions(self.q_reg(hidden), reference_pose[:, 3:])
        return torch.cat((position, F.normalize(orientation, dim=1)), dim=1)


def multiply_quaternions(left, right):
    """Hamilton product, scalar first: two of N x 4 -> N x 4; as rotations, `right` is applied first."""
    w1, v1, w2, v2 = left[:, :1], left[:, 1:], right[:, :1], right[:, 1:]
    return torch.cat((w1 * w2 - (v1 * v2).sum(1, keepdim=True), w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)), dim=1)
