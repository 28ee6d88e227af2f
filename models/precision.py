"""The precision that networks compute in: fp32, bf16, fp16, or auto for the fastest on a device."""
import contextlib
import functools
import re

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision, device):
    """Return the precision to train in, 'fp32', 'bf16' or 'fp16', for the config's `precision`.

    'auto' becomes bf16 on devices that compute in it: GPUs of compute capability 8.0 or later, CPUs with AVX512-BF16 or
    AMX. It becomes fp16 on GPUs of compute capability 7.0 to 7.5, and fp32 on all others.
    """
    return _fastest(device) if precision == "auto" else precision


def autocast(precision, device):
    """Return a context in which networks compute in a precision.

    'auto' is fp32 here. A training resolves it first, and a test needs fp32 for the published errors.
    """
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()  # which exports faster


@functools.cache
def _fastest(device):
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    try:
        with open("/proc/cpuinfo") as file:
            return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", file.read()) else "fp32"
    except OSError:  # not Linux
        return "fp32"
