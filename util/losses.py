"""The pose loss, which trains APRs, PAEs and refiners."""
import torch
import torch.nn.functional as F
from torch import nn

from util.rotations import on_side_of


class CameraPoseLoss(nn.Module):
    """The sum of position loss and orientation loss, with weights that are learned or fixed.

    l_x is the batch mean of |x - x'|_p, and l_q that of |q/|q| - q'/|q'||_p for the nearer sign of q', where p is the
    config's `norm`. With learned weights (`learnable`) the sum is l_x exp(-s_x) + s_x + l_q exp(-s_q) + s_q (Kendall &
    Cipolla, CVPR 2017, eq. 5). Otherwise it is s_x l_x + s_q l_q.
    """

    def __init__(self, config):
        super().__init__()
        self.learnable, self.norm = config["learnable"], config["norm"]
        self.s_x, self.s_q = (nn.Parameter(torch.tensor([float(config[key])]), requires_grad=self.learnable)
                              for key in ("s_x", "s_q"))

    def forward(self, est_pose, gt_pose):
        """Return the loss, a scalar, of estimated against true poses: N x 7, N x 7."""
        l_x = torch.linalg.vector_norm(est_pose[:, :3] - gt_pose[:, :3], ord=self.norm, dim=1).mean()
        est_q, gt_q = F.normalize(est_pose[:, 3:], dim=1), F.normalize(gt_pose[:, 3:], dim=1)
        l_q = torch.linalg.vector_norm(est_q - on_side_of(gt_q, est_q), ord=self.norm, dim=1).mean()
        if self.learnable:
            return (l_x * torch.exp(-self.s_x) + self.s_x + l_q * torch.exp(-self.s_q) + self.s_q).squeeze()
        return (self.s_x * l_x + self.s_q * l_q).squeeze()
