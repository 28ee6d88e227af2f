"""The convolutional backbones: build them, fill them with weights, and take feature maps from them.

Module names follow the published checkpoints: ResNet-50 and MobileNetV2 are `Sequential`s of torchvision's children
without the classifier, EfficientNet-B0 is efficientnet-pytorch's whole network.
"""
import os
import sys

import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from efficientnet_pytorch.utils import Conv2dStaticSamePadding, url_map
from torch import nn

from models.checkpoints import check_numbers, read_module_tensors
from util.errors import UserError

# type: feature channels
FEATURES = {"efficientnet": 1280, "resnet50": 2048, "mobilenet": 1280}
# EfficientNet-B0 endpoint: (blocks up to it, channels); 1/8 and 1/16 of the image's resolution
ENDPOINTS = {"reduction_3": (5, 40), "reduction_4": (11, 112)}

_BUILDERS = {
    "efficientnet": lambda: EfficientNet.from_name("efficientnet-b0"),
    "resnet50": lambda: torchvision.models.resnet50(weights=None),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(weights=None),
}
_IMAGENET_URLS = {
    "efficientnet": url_map["efficientnet-b0"],
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url,
    "mobilenet": torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.url,
}
_CLASSIFIERS = ("_fc.", "fc.", "classifier.")  # not used here, so that a file may lack them or hold other classes


def check_backbone_path(backbone_path):
    """Raise UserError unless `backbone_path` is 'imagenet', 'none' or a file."""
    if backbone_path not in ("imagenet", "none") and not os.path.isfile(backbone_path):
        raise UserError(f"backbone '{backbone_path}': no such file; give a weights file, 'imagenet' or 'none'")


def build_backbone(backbone_type, backbone_path):
    """Build a backbone and fill it.

    backbone_type: 'efficientnet', 'resnet50' or 'mobilenet'.
    backbone_path: a state dict of torchvision or efficientnet-pytorch, the published pickled EfficientNet, 'imagenet'
        (the library's pretrained weights, downloaded once into PyTorch's hub cache) or 'none' (random).

    Returns a module whose `feature_map(module, img)` is N x FEATURES[backbone_type] x h x w. Raises UserError for an
    unknown type or a file that does not fit.
    """
    if backbone_type not in _BUILDERS:
        raise UserError(f"unknown backbone_type '{backbone_type}': choose one of {', '.join(_BUILDERS)}")
    check_backbone_path(backbone_path)
    network = _BUILDERS[backbone_type]()
    if backbone_path == "imagenet":
        _fill(network, _download(_IMAGENET_URLS[backbone_type]), backbone_type, _IMAGENET_URLS[backbone_type])
    elif backbone_path != "none":
        _fill(network, read_module_tensors(backbone_path), backbone_type, backbone_path)

    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 \
                and (module.stride[0] > 1 or module.kernel_size[0] > 3):
            module.__class__ = _SlowInBf16Same if isinstance(module, Conv2dStaticSamePadding) else _SlowInBf16
    if backbone_type == "resnet50":
        return nn.Sequential(*list(network.children())[:-2])
    if backbone_type == "mobilenet":
        return nn.Sequential(*list(network.children())[:-1])
    return network


def feature_map(backbone, img):
    """The last feature map of a backbone: N x 3 x H x W -> N x C x H/32 x W/32."""
    return backbone.extract_features(img) if isinstance(backbone, EfficientNet) else backbone(img)


class _SlowInBf16(nn.Conv2d):
    """A depthwise convolution that is strided or larger than 3 x 3: its bf16 gradient is three to ten times slower than the
    fp32 one on a CPU (oneDNN), so that a CPU trains it in fp32."""

    def forward(self, x):
        if x.device.type != "cpu" or not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class _SlowInBf16Same(_SlowInBf16, Conv2dStaticSamePadding):
    """The same with EfficientNet's padding."""


class EndpointBackbone(nn.Module):
    """EfficientNet-B0 that returns intermediate feature maps, for MS-Transformer.

    forward: N x 3 x H x W -> a feature map an endpoint name, N x C x H/s x W/s. The trunk stops after the last one.
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
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True,
                                                  weights_only=True)
    except Exception as error:  # the network's, the hash's, or a damaged file's in the cache
        raise UserError(f"imagenet: {url} could not be downloaded, or its copy under {torch.hub.get_dir()} is damaged "
                        f"({error}); give a weights file or 'none'") from error


def _fill(network, tensors, backbone_type, source):
    own = network.state_dict()
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_CLASSIFIERS)}
    expected = {key for key in own if not key.startswith(_CLASSIFIERS)}
    # Files from before PyTorch 0.4.1 lack batch norm's counters, which nothing here reads.
    missing = [key for key in sorted(expected - set(tensors)) if not key.endswith("num_batches_tracked")]
    unexpected = sorted(set(tensors) - expected)
    misshapen = [key for key in tensors if key in own and tensors[key].shape != own[key].shape]
    if missing or unexpected or misshapen:
        problem = (f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}" if unexpected else
                   f"has {tuple(tensors[misshapen[0]].shape)} for {misshapen[0]}, not {tuple(own[misshapen[0]].shape)}")
        raise UserError(f"{source}: not the weights of a {backbone_type} backbone: it {problem}")
    check_numbers(source, tensors, own)
    network.load_state_dict(tensors, strict=False)
