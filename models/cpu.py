"""What exists only to be fast on a CPU. On a GPU everything here behaves as PyTorch's own."""
import contextlib
import ctypes

import torch
import torch.nn.functional as F
from efficientnet_pytorch.utils import Conv2dStaticSamePadding
from torch import nn


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits per element instead of a float: a third of the time on a CPU.

    The probability is rounded to a multiple of 1/65536.
    """

    def forward(self, x):
        if not (self.training and self.p) or x.device.type != "cpu":
            return super().forward(x)
        n_dropped = min(round(self.p * 2 ** 16), 2 ** 16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        keep = (bits[:x.numel()].view(x.shape) >= n_dropped - 2 ** 15).to(x.dtype)
        return x * keep.mul_(1 / (1 - n_dropped / 2 ** 16))


def drop_values(values, p):
    """Dropout of attention, applied to the values N x heads x L x C instead of the weights.

    Dropping single weights needs all of them in memory, 784 x 784 per head, and takes a CPU five times as long as the
    attention itself. Each query's result has the same distribution as with dropped weights. But the queries of one head
    all drop the same tokens.
    """
    return values * F.dropout(values.new_ones(values.shape[:3]), p).unsqueeze(3) if p else values


def avoid_slow_bf16(network):
    """Let a CPU train those convolutions of a network in fp32 whose bf16 gradient is slow.

    These are the depthwise convolutions that are strided or larger than 3 x 3. Their bf16 gradient takes oneDNN three
    to ten times as long as the fp32 one.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 \
                and (module.stride[0] > 1 or module.kernel_size[0] > 3):
            # The class is changed in place, so that names in state dicts stay the published ones.
            module.__class__ = _SamePaddingFp32Conv2d if isinstance(module, Conv2dStaticSamePadding) else _Fp32Conv2d


class _Fp32Conv2d(nn.Conv2d):
    """A convolution that a CPU trains in fp32, also under bf16 autocast."""

    def forward(self, x):
        if x.device.type != "cpu" or not (torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class _SamePaddingFp32Conv2d(_Fp32Conv2d, Conv2dStaticSamePadding):
    """The same with EfficientNet's padding."""


def keep_freed_memory():
    """Tell glibc to keep freed memory.

    By default glibc returns large blocks at once. Every training step then pays again for the pages of all its
    activations, which takes a CPU as long as computing them.
    """
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_MAX; M_TRIM_THRESHOLD, where -1 means never; M_TOP_PAD
        for parameter, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):
            mallopt(parameter, value)
