"""Reading and writing files of torch.save. Reading never runs code from a file."""
import io
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import torch

from util.errors import UserError
from util.files import whole_file

# The classes in a pickled EfficientNet, over all versions of efficientnet-pytorch and PyTorch that may have written it.
_PICKLED_CLASSES = [f"efficientnet_pytorch.{name}" for name in (
    "model.EfficientNet", "model.MBConvBlock", "utils.Conv2dStaticSamePadding", "utils.Conv2dDynamicSamePadding",
    "utils.Identity", "utils.Swish", "utils.MemoryEfficientSwish", "utils.GlobalParams", "utils.BlockArgs",
    "model.Swish", "model.MemoryEfficientSwish")] + [f"torch.nn.modules.{name}" for name in (
        "conv.Conv2d", "batchnorm.BatchNorm2d", "linear.Linear", "linear.Identity", "dropout.Dropout",
        "container.ModuleList", "container.Sequential", "pooling.AdaptiveAvgPool2d", "padding.ZeroPad2d",
        "activation.Sigmoid", "activation.SiLU")]
_PICKLED_FUNCTIONS = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set, "__builtin__.set": set,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
}


class _Pickled:
    """A stand-in for every class of _PICKLED_CLASSES: holds an object's attributes from the file, and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass


class _LegacyUnpickler(pickle.Unpickler):
    """Reads whole modules in the format before PyTorch 1.6, whose way of naming classes weights_only refuses."""

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name in _PICKLED_CLASSES:
            # One class per kind of object, without source code that PyTorch could compare with the file's.
            return type(name, (_Pickled,), {"__module__": "pickled", "dump_patches": False})
        if full_name in _PICKLED_FUNCTIONS:
            return _PICKLED_FUNCTIONS[full_name]
        raise pickle.UnpicklingError(f"it names {full_name}, which is not part of an EfficientNet")


_LEGACY_PICKLE = SimpleNamespace(Unpickler=_LegacyUnpickler, __name__="pickle",
                                 load=lambda file, **kwargs: _LegacyUnpickler(file, **kwargs).load())


def load(path):
    """Return what torch.save wrote to a file, if it is tensors, numbers, strings and containers alone.

    Raises UserError for a file that does not exist, is damaged, or holds anything else.
    """
    return _load(path)


def load_module(path):
    """Return what `load` returns; for the published pickled EfficientNet, whose file holds a module, name -> tensor.

    The zip format and the format before PyTorch 1.6 are both read. Raises UserError as `load` does.
    """
    loaded = _load(path, classes=[(_Pickled, name) for name in _PICKLED_CLASSES])
    if not isinstance(loaded, _Pickled):
        return loaded
    try:
        return dict(_tensors_of(loaded))
    except (AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: a pickled module with a structure that no module has") from error


def save(path, value):
    """torch.save to a file that appears complete or not at all. Raises UserError if it cannot be written."""
    buffer = io.BytesIO()  # torch.save to a file would hide why the file cannot be written
    torch.save(value, buffer)
    with whole_file(path, "wb") as file:
        file.write(buffer.getbuffer())


def _load(path, classes=()):
    """`load`, with stand-ins for classes: (stand-in, name of the class) each."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    _check_records(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the parser raises, the cause is the file
        if classes and "persistent_load" in str(error) and _is_legacy(path):
            try:
                with warnings.catch_warnings(action="ignore"):  # PyTorch warns that it cannot compare source code
                    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_LEGACY_PICKLE)
            except Exception as legacy_error:
                error = legacy_error
        raise UserError(f"{path}: not a readable weights file, a PyTorch state dict is needed "
                        f"({_reason(error)})") from error


def _reason(error):
    """One line from an exception of torch.load, whose message can fill pages with ways to run the file's code."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it names {refused[1]}, and code from a file is never run"
    problem = re.search(r"WeightsUnpickler error: (.*)", text)
    if problem:
        return problem[1]
    return text.splitlines()[0][:160] if text else type(error).__name__


def _check_records(path):
    """Compare the checksums of a zip file's records, which PyTorch does not. Raises UserError if one differs."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as records:
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                raise ValueError("its records are compressed, but PyTorch does not compress")
            damaged = records.testzip()
        if damaged:
            raise ValueError(f"its record {damaged} is damaged")
    except Exception as error:  # as in `_load`
        raise UserError(f"{path}: not a readable weights file ({error})") from error


def _is_legacy(path):
    """Return whether a file begins as PyTorch's format before 1.6 does: with a pickle of its magic number.

    No other file may reach torch.load without weights_only, which would run a zip file that holds TorchScript.
    """
    with open(path, "rb") as file:
        return file.read(14) == b"\x80\x02\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def _tensors_of(module, prefix=""):
    """Yield (name, tensor) of a pickled module and its children, named as in a state dict."""
    members = vars(module)
    for name, tensor in [*members.get("_parameters", {}).items(), *members.get("_buffers", {}).items()]:
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in members.get("_modules", {}).items():
        if isinstance(child, _Pickled):
            yield from _tensors_of(child, f"{prefix}{name}.")
