"""The precision that networks compute in: fp32, bf16 or fp16, or the best of them for a device."""
import functools
import re

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision, device):
    """The precision to train in, 'fp32', 'bf16' or 'fp16', for the config's `precision`.

    auto is bf16 where the device computes with it (CUDA since compute capability 8.0, CPUs with AVX512-BF16 or AMX), fp16
    on CUDA of 7.0 to 7.5, else fp32.
    """
    return _fastest(device) if precision == "auto" else precision


def autocast(precision, device):
    """A context in which networks compute in a precision; auto, where nothing trains, is fp32, whose errors are the
    published ones."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@functools.cache
def _fastest(device):
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    try:
        with open("/proc/cpuinfo") as file:
            return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", file.read()) else "fp32"
    except OSError:  # another system
        return "fp32"
