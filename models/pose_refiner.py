"""The learned refiner: a correction of an APR's pose from the APR's own latents.

The published refiner cannot run (it declares 512 inputs and is given 1024). Its idea, from a query's latents and the encoding
of a reference pose near it to the pose between, makes poses worse on walks that the training has not seen, and applying a
refiner again to its own output does too; the query's latents alone, with strong dropout, make them better.
"""
import torch
import torch.nn.functional as F
from torch import nn

from util.rotations import multiply_quaternions


class PoseRefiner(nn.Module):
    """forward(latents N x 2 latent_dim, pose N x 7) -> pose N x 7.

    Latents are position and orientation concatenated, the pose is the APR's. The network regresses a translation and a
    rotation that is applied after the pose's; untrained, it returns the pose. The quaternion is unit, scalar first.
    """

    def __init__(self, latent_dim, dropout=0.2):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(2 * latent_dim, 256), nn.ReLU(), nn.Dropout(dropout),
                                    nn.Linear(256, 256), nn.ReLU(), nn.Dropout(dropout))
        self.x_reg = nn.Linear(256, 3)
        self.q_reg = nn.Linear(256, 4)
        self.register_buffer("mean", torch.zeros(2 * latent_dim))
        self.register_buffer("deviation", torch.ones(2 * latent_dim))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("apr", torch.zeros(16, dtype=torch.uint8))  # the APR's fingerprint; zeros: unknown
        for linear in (self.hidden[0], self.hidden[3]):
            nn.init.xavier_uniform_(linear.weight)
        for parameter in (*self.x_reg.parameters(), *self.q_reg.parameters()):
            nn.init.zeros_(parameter)
        nn.init.ones_(self.q_reg.bias[:1])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(f"{prefix}apr", self.apr)  # which earlier files lack
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_inputs(self, latents, estimates, poses):
        """Take the mean and the standard deviation of the latents, N x 2 latent_dim, and the median distance of the APR's
        estimates from the true poses, N x 7, in whose units the translation is regressed."""
        self.mean.copy_(latents.mean(dim=0))
        deviation = latents.std(dim=0, correction=0)
        # Many latents are 0 for every frame.
        self.deviation.copy_(deviation.clamp(min=0.1 * deviation.max()) if deviation.any() else torch.ones_like(deviation))
        distance = (estimates[:, :3] - poses[:, :3]).norm(dim=1).median()
        self.spread.copy_(distance if distance > 0 else torch.ones(()))

    def forward(self, latents, pose):
        hidden = self.hidden((latents - self.mean) / self.deviation)
        position = pose[:, :3] + self.spread * self.x_reg(hidden)
        orientation = multiply_quaternions(self.q_reg(hidden), pose[:, 3:])
        return torch.cat((position, F.normalize(orientation, dim=1)), dim=1)
