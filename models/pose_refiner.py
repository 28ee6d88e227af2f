"""The learned refiner: an MLP that corrects an APR's pose, given the APR's own latents.

The published refiner cannot run: it declares 512 inputs and is given 1024. Its idea was to regress the pose between the
query and a near reference from the query's latents and the reference's encoding. On walks that the training has not
seen, that makes poses worse. Applying a refiner again to its own output does too. The query's latents alone, with
strong dropout, make poses better.
"""
import torch
import torch.nn.functional as F
from torch import nn

from util.rotations import multiply_quaternions


class PoseRefiner(nn.Module):
    """forward(latents N x 2 latent_dim, pose N x 7) -> pose N x 7 with a unit quaternion, scalar first.

    The latents (position's, then orientation's) and the pose are the APR's. The network regresses a translation and a
    rotation, which is applied after the pose's rotation. Before training, it returns the APR's pose.
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
        state_dict.setdefault(f"{prefix}apr", self.apr)  # earlier files lack it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_inputs(self, latents, estimates, poses):
        """Set what normalises inputs and outputs, from training frames.

        latents: N x 2 latent_dim, whose mean and standard deviation are kept. estimates, poses: N x 7, the APR's
        estimates and the true poses. The median distance between their positions is the unit of the translation.
        """
        self.mean.copy_(latents.mean(dim=0))
        deviation = latents.std(dim=0, correction=0)
        # Many latents are 0 for every frame, so deviations have a lower bound.
        self.deviation.copy_(deviation.clamp(min=0.1 * deviation.max()) if deviation.any()
                             else torch.ones_like(deviation))
        distance = (estimates[:, :3] - poses[:, :3]).norm(dim=1).median()
        self.spread.copy_(distance if distance > 0 else torch.ones(()))

    def forward(self, latents, pose):
        hidden = self.hidden((latents - self.mean) / self.deviation)
        position = pose[:, :3] + self.spread * self.x_reg(hidden)
        orientation = multiply_quaternions(self.q_reg(hidden), pose[:, 3:])
        return torch.cat((position, F.normalize(orientation, dim=1)), dim=1)
