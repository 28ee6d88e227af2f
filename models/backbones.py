"""The convolutional backbones: build them, fill them with weights, and compute feature maps with them.

Module names follow the published checkpoints. Networks of torchvision are `Sequential`s of their children without
pooling and classifier. EfficientNet-B0 is the whole network of efficientnet-pytorch.
"""
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import url_map
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.checkpoints import check_numbers, read_module_tensors
from models.cpu import avoid_slow_bf16
from util.errors import UserError
from util.quick_torchvision import torchvision

# Endpoint of EfficientNet-B0: (number of blocks up to it, channels). Resolutions are 1/8 and 1/16 of the image's.
ENDPOINTS = {"reduction_3": (5, 40), "reduction_4": (11, 112)}

# Prefixes of the classifiers. They are not used here: a file may lack them, or hold them for other classes.
CLASSIFIERS = ("_fc.", "fc.", "classifier.")


@dataclass(frozen=True)
class Backbone:
    """A convolutional network of a library.

    build: () -> the network with random weights.
    channels: of its last feature map, whose resolution is 1/32 of the image's.
    url: its weights pretrained on ImageNet.
    n_left_out: how many of its last children (pooling, classifier) follow the last feature map; 0 for a network with
        `extract_features`.
    marker: a tensor of what is left that no other backbone has, by which checkpoints are recognised.
    """

    build: Callable
    channels: int
    url: str
    n_left_out: int
    marker: str


BACKBONES = {
    "efficientnet": Backbone(
        build=lambda: EfficientNet.from_name("efficientnet-b0"), channels=1280, url=url_map["efficientnet-b0"],
        n_left_out=0, marker="_conv_stem.weight"),
    "resnet50": Backbone(
        build=torchvision.models.resnet50, channels=2048,
        url=torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url, n_left_out=2, marker="4.0.conv1.weight"),
    "mobilenet": Backbone(
        build=torchvision.models.mobilenet_v2, channels=1280,
        url=torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url, n_left_out=1,
        marker="0.1.conv.0.0.weight"),
}


def check_backbone_path(backbone_path):
    """Raise UserError unless `backbone_path` is 'imagenet', 'none' or a file."""
    if backbone_path not in ("imagenet", "none") and not os.path.isfile(backbone_path):
        raise UserError(f"backbone '{backbone_path}': no such file; give a weights file, 'imagenet' or 'none'")


def build_backbone(backbone_type, backbone_path):
    """Build a backbone and fill it with weights.

    backbone_type: of BACKBONES.
    backbone_path: a state dict of torchvision or efficientnet-pytorch, the published pickled EfficientNet, 'imagenet'
        (the library's pretrained weights, downloaded once into PyTorch's hub cache) or 'none' (random weights).

    Returns a module for `feature_map`. Raises UserError for an unknown type and for a file that does not fit.
    """
    if backbone_type not in BACKBONES:
        raise UserError(f"unknown backbone_type '{backbone_type}': choose one of {', '.join(BACKBONES)}")
    check_backbone_path(backbone_path)
    backbone = BACKBONES[backbone_type]
    network = backbone.build()
    if backbone_path == "imagenet":
        _fill(network, _download(backbone.url), backbone_type, backbone.url)
    elif backbone_path != "none":
        _fill(network, read_module_tensors(backbone_path), backbone_type, backbone_path)

    avoid_slow_bf16(network)
    return nn.Sequential(*list(network.children())[:-backbone.n_left_out]) if backbone.n_left_out else network


def feature_map(backbone, img):
    """Return the last feature map of a backbone: N x 3 x H x W -> N x C x H/32 x W/32."""
    return backbone.extract_features(img) if isinstance(backbone, EfficientNet) else backbone(img)


def fold_batch_norms(network):
    """Fold every batch norm of a frozen network into the convolution that is its sibling before it, in place.

    All BACKBONES name them so. A GPU and a CPU then pass over every feature map once less.
    """
    convolution = None  # (name, module), of the sibling before
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm2d) and convolution:
            setattr(network, convolution[0], fuse_conv_bn_eval(convolution[1], module))
            setattr(network, name, nn.Identity())
        fold_batch_norms(module)
        convolution = (name, module) if isinstance(module, nn.Conv2d) else None


class EndpointBackbone(nn.Module):
    """EfficientNet-B0 that returns intermediate feature maps, for MS-Transformer.

    forward(N x 3 x H x W) -> list of feature maps N x C x H/s x W/s, one per endpoint. Blocks after the last endpoint
    are not run.
    """

    def __init__(self, endpoints, backbone_path):
        super().__init__()
        unknown = [name for name in endpoints if name not in ENDPOINTS]
        if unknown:
            raise UserError(f"reduction: unknown endpoint '{unknown[0]}', choose from {', '.join(ENDPOINTS)}")
        self.endpoints = list(endpoints)
        self.body = build_backbone("efficientnet", backbone_path)

    def forward(self, img):
        body = self.body
        ends = [ENDPOINTS[name][0] for name in self.endpoints]
        drop_connect_rate = body._global_params.drop_connect_rate or 0.0
        x = body._swish(body._bn0(body._conv_stem(img)))
        maps = {}
        for i, block in enumerate(body._blocks[: max(ends)]):
            x = block(x, drop_connect_rate=drop_connect_rate * i / len(body._blocks))
            maps[i + 1] = x
        return [maps[end] for end in ends]


def _download(url):
    """Return the state dict at an address, from PyTorch's hub cache if it is there. Raises UserError."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=sys.stderr.isatty(),
                                                  check_hash=True, weights_only=True)
    except Exception as error:  # no network, a wrong hash, or a damaged file in the cache
        raise UserError(f"imagenet: {url} could not be downloaded, or its copy under {torch.hub.get_dir()} is damaged "
                        f"({error}); give a weights file or 'none'") from error


def _fill(network, tensors, backbone_type, source):
    """Load a state dict into a network, except for its classifier.

    Raises UserError, naming `source`, if it does not fit.
    """
    own = network.state_dict()
    tensors = {key: value for key, value in tensors.items() if not key.startswith(CLASSIFIERS)}
    expected = {key for key in own if not key.startswith(CLASSIFIERS)}
    # Files from before PyTorch 0.4.1 lack the counters of batch norm. Nothing here reads them.
    missing = [key for key in sorted(expected - set(tensors)) if not key.endswith("num_batches_tracked")]
    unexpected = sorted(set(tensors) - expected)
    reshaped = [key for key in tensors if key in own and tensors[key].shape != own[key].shape]
    problem = None
    if missing:
        problem = f"lacks {missing[0]}"
    elif unexpected:
        problem = f"holds {unexpected[0]}"
    elif reshaped:
        key = reshaped[0]
        problem = f"has {tuple(tensors[key].shape)} for {key}, not {tuple(own[key].shape)}"
    if problem:
        raise UserError(f"{source}: not the weights of a {backbone_type} backbone: it {problem}")
    check_numbers(source, tensors, own)
    network.load_state_dict(tensors, strict=False)
