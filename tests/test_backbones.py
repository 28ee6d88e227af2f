"""Every backbone is declared completely."""
import pytest
import torch
from test_weights import BACKBONES as BUILDERS

from models import get_model
from models.backbones import BACKBONES, feature_map
from models.checkpoints import describe
from util.config import KEYS


@pytest.mark.parametrize("backbone_type", BACKBONES)
def test_a_backbone_is_accepted_computes_its_channels_and_is_recognised(backbone_type):
    _, accepts = KEYS["backbone_type"]
    assert accepts(backbone_type) and backbone_type in BUILDERS
    apr = get_model("posenet", "none", {"backbone_type": backbone_type, "hidden_dim": 8}).eval()
    channels = BACKBONES[backbone_type].channels
    assert feature_map(apr.backbone, torch.zeros(1, 3, 96, 96)).shape == (1, channels, 3, 3)
    assert describe(apr.state_dict()) == {"kind": "posenet", "backbone_type": backbone_type, "hidden_dim": 8}
    others = [other.marker for name, other in BACKBONES.items() if name != backbone_type]
    assert not any(f"backbone.{marker}" in apr.state_dict() for marker in others)
    assert BACKBONES[backbone_type].url.startswith("https://")
