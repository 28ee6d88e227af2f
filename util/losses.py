"""The losses that train APRs, PAEs and refiners."""
import torch
import torch.nn.functional as F
from torch import nn

from util.rotations import on_side_of


class CameraPoseLoss(nn.Module):
    """Position and orientation losses, weighted by learned uncertainties or by hand.

    forward(est_pose N x 7, gt_pose N x 7) -> scalar: with learnable weights l_x exp(-s_x) + s_x + l_q exp(-s_q) + s_q
    (Kendall & Cipolla, CVPR 2017, eq. 5), else s_x l_x + s_q l_q; l_x and l_q are batch means of the p-norms (config
    key `norm`) of the differences in position and between unit quaternions, of the nearer sign.
    """

    def __init__(self, config):
        super().__init__()
        self.learnable, self.norm = config["learnable"], config["norm"]
        self.s_x, self.s_q = (nn.Parameter(torch.tensor([float(config[key])]), requires_grad=self.learnable)
                              for key in ("s_x", "s_q"))

    def forward(self, est_pose, gt_pose):
        l_x = torch.linalg.vector_norm(est_pose[:, :3] - gt_pose[:, :3], ord=self.norm, dim=1).mean()
        est_q, gt_q = F.normalize(est_pose[:, 3:], dim=1), F.normalize(gt_pose[:, 3:], dim=1)
        l_q = torch.linalg.vector_norm(est_q - on_side_of(gt_q, est_q), ord=self.norm, dim=1).mean()
        if self.learnable:
            return (l_x * torch.exp(-self.s_x) + self.s_x + l_q * torch.exp(-self.s_q) + self.s_q).squeeze()
        return (self.s_x * l_x + self.s_q * l_q).squeeze()
