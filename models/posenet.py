"""PoseNet: a convolutional backbone, average pooling and two small heads (Kendall et al., ICCV 2015).

This is the variant of Shavit & Keller, ECCV 2022, arXiv 2207.05530, section 4.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import BACKBONES, build_backbone, feature_map
from models.precision import autocast


class PoseNet(nn.Module):
    """A single-scene APR.

    forward({'img': N x 3 x H x W}) -> {'pose': N x 7, 'latent_x': N x hidden_dim, 'latent_q': N x hidden_dim}.

    The pose is a position in metres and a quaternion, scalar first, that is not normalised. The latents are what the
    position head and the orientation head read, before dropout.
    """

    def __init__(self, config, backbone_path):
        super().__init__()
        backbone_type, hidden_dim = config["backbone_type"], config["hidden_dim"]
        self.backbone = build_backbone(backbone_type, backbone_path)
        self.x_latent_fc = nn.Linear(BACKBONES[backbone_type].channels, hidden_dim)
        self.q_latent_fc = nn.Linear(BACKBONES[backbone_type].channels, hidden_dim)
        self.x_reg = nn.Linear(hidden_dim, 3)
        self.q_reg = nn.Linear(hidden_dim, 4)
        self.precision = config["precision"]
        self.dropout = nn.Dropout(p=0.1)
        self.register_buffer("origin", None)  # see models.set_origin
        for linear in (self.x_latent_fc, self.q_latent_fc, self.x_reg, self.q_reg):
            nn.init.kaiming_normal_(linear.weight)

    def forward(self, data):
        with autocast(self.precision, data["img"].device):
            features = feature_map(self.backbone, data["img"])
        features = features.float().mean(dim=(2, 3))
        # The two layers are crossed, because the published checkpoints were trained so.
        latent_q = F.relu(self.x_latent_fc(features))
        latent_x = F.relu(self.q_latent_fc(features))
        return {"pose": self.regress(latent_x, latent_q), "latent_x": latent_x, "latent_q": latent_q}

    def regress(self, latent_x, latent_q):
        """Return the poses that the heads regress from latents: N x hidden_dim, N x hidden_dim -> N x 7."""
        return torch.cat((self.x_reg(self.dropout(latent_x)), self.q_reg(self.dropout(latent_q))), dim=1)
