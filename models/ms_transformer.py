"""MS-Transformer: one model for many scenes (Shavit, Ferens & Keller, ICCV 2021, arXiv 2103.11468, section 3).

Two feature maps of EfficientNet-B0 go through two transformers, one for the position and one for the orientation. Each
has one query per scene. The scene is classified from both. The latents of the chosen scene are regressed to a pose.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import ENDPOINTS, EndpointBackbone
from models.precision import autocast
from models.transformer import LearnedPositions, Transformer
from util.errors import UserError


class MSTransPoseNet(nn.Module):
    """ms-transposenet: MS-Transformer with one pair of heads per scene.

    forward({'img': N x 3 x H x W, 'scene': N scene indices or None}) -> {'pose': N x 7,
    'scene_log_distr': N x num_scenes}. The pose is that of the given scene, else of the most likely one: a position in
    metres and a quaternion, scalar first, that is not normalised.
    """

    def __init__(self, config, backbone_path):
        super().__init__()
        hidden_dim, num_scenes = config["hidden_dim"], config["num_scenes"]
        # The published code reads `nhead`, never the configs' `nheads`, so the published checkpoints have 8 heads.
        nhead, dropout = config["nhead"], config["dropout"]
        if hidden_dim % nhead or hidden_dim % 2:
            raise UserError(f"hidden_dim {hidden_dim} must be even and divisible by nhead {nhead}")
        reduction = config["reduction"]
        if len(reduction) != 2:
            raise UserError(f"reduction is {reduction}, but it must name two endpoints: the position branch's, then "
                            "the orientation branch's")

        def transformer(branch):
            return Transformer(hidden_dim, nhead, config[f"num_{branch}_encoder_layers"],
                               config[f"num_{branch}_decoder_layers"], config["dim_feedforward"], dropout)

        self.backbone = nn.Sequential(EndpointBackbone(reduction, backbone_path), LearnedPositions(hidden_dim))
        self.transformer_t = transformer("t")
        self.transformer_rot = transformer("rot")
        channels_t, channels_rot = (ENDPOINTS[name][1] for name in reduction)
        self.input_proj_t = nn.Conv2d(channels_t, hidden_dim, kernel_size=1)
        self.input_proj_rot = nn.Conv2d(channels_rot, hidden_dim, kernel_size=1)
        self.query_embed_t = nn.Embedding(num_scenes, hidden_dim)
        self.query_embed_rot = nn.Embedding(num_scenes, hidden_dim)
        self.precision = config["precision"]
        self.register_buffer("origin", None)  # see models.set_origin
        self.scene_embed = nn.Linear(2 * hidden_dim, 1)
        self.regressor_head_t, self.regressor_head_rot = self.build_heads(hidden_dim, num_scenes)

    def build_heads(self, hidden_dim, num_scenes):
        return (nn.ModuleList(PoseRegressor(hidden_dim, 3) for _ in range(num_scenes)),
                nn.ModuleList(PoseRegressor(hidden_dim, 4) for _ in range(num_scenes)))

    def forward(self, data):
        return self.forward_heads(self.forward_transformers(data))

    def forward_transformers(self, data):
        """Compute everything but the heads: a batch -> latents, chosen scenes and scores of scenes.

        They are {'latent_x', 'latent_q': N x hidden_dim, 'scene': N, 'scene_log_distr': N x num_scenes}. The latents
        are those of the chosen scene.
        """
        backbone, positions = self.backbone
        with autocast(self.precision, data["img"].device):
            map_t, map_rot = backbone(data["img"])
            latents_t = self.transformer_t(self.input_proj_t(map_t), self.query_embed_t.weight, positions(map_t))
            latents_rot = self.transformer_rot(self.input_proj_rot(map_rot), self.query_embed_rot.weight,
                                               positions(map_rot))
        latents_t, latents_rot = latents_t.float(), latents_rot.float()
        scores = self.scene_embed(torch.cat((latents_t, latents_rot), dim=2)).squeeze(2)
        scene_log_distr = F.log_softmax(scores, dim=1)
        scene = data.get("scene")
        scene = scene_log_distr.argmax(dim=1) if scene is None else scene.long()
        frames = torch.arange(scene.shape[0], device=scene.device)
        return {"latent_x": latents_t[frames, scene], "latent_q": latents_rot[frames, scene], "scene": scene,
                "scene_log_distr": scene_log_distr}

    def forward_heads(self, result):
        """Regress poses: the result of `forward_transformers` -> that of `forward`."""
        pose = torch.cat((regress_each(self.regressor_head_t, result["latent_x"], result["scene"]),
                          regress_each(self.regressor_head_rot, result["latent_q"], result["scene"])), dim=1)
        return {"pose": pose, "scene_log_distr": result["scene_log_distr"]}


class EMSTransPoseNet(MSTransPoseNet):
    """ems-transposenet: MS-Transformer with one pair of heads for all scenes, the model with published weights.

    forward also returns the latents that the heads read: 'latent_x' and 'latent_q', N x hidden_dim.
    """

    def build_heads(self, hidden_dim, num_scenes):
        return PoseRegressor(hidden_dim, 3), PoseRegressor(hidden_dim, 4)

    def forward_heads(self, result):
        latents = {"latent_x": result["latent_x"], "latent_q": result["latent_q"]}
        return {"pose": self.regress(**latents), "scene_log_distr": result["scene_log_distr"], **latents}

    def regress(self, latent_x, latent_q):
        """Return the poses that the heads regress from latents: N x hidden_dim, N x hidden_dim -> N x 7."""
        return torch.cat((self.regressor_head_t(latent_x), self.regressor_head_rot(latent_q)), dim=1)


class PoseRegressor(nn.Module):
    """A head. forward(N x in_dim) -> N x out_dim, with 1024 hidden units."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.fc_h = nn.Linear(in_dim, 1024)
        self.fc_o = nn.Linear(1024, out_dim)
        nn.init.xavier_uniform_(self.fc_h.weight)
        nn.init.xavier_uniform_(self.fc_o.weight)

    def forward(self, latent):
        return self.fc_o(F.gelu(self.fc_h(latent)))


def regress_each(heads, latents, scene):
    """Return what each latent's own head regresses from it, in one product over all heads.

    heads: S `PoseRegressor`s; latents: N x in_dim; scene: N, the index of each latent's head. Returns N x out_dim.
    """
    weight_h, bias_h, weight_o, bias_o = (torch.stack(tensors) for tensors in zip(*(
        (head.fc_h.weight, head.fc_h.bias, head.fc_o.weight, head.fc_o.bias) for head in heads)))
    hidden = F.gelu(torch.baddbmm(bias_h.unsqueeze(1), latents.expand(len(heads), -1, -1), weight_h.transpose(1, 2)))
    outputs = torch.baddbmm(bias_o.unsqueeze(1), hidden, weight_o.transpose(1, 2))
    return outputs[scene, torch.arange(scene.shape[0], device=scene.device)]
