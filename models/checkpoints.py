"""Reading and writing weights. Reading never runs code from the file, and only tensors come of it."""
import hashlib
import io
import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch

from util.errors import UserError
from util.files import whole_file

# The classes that a pickled EfficientNet holds, over the versions of efficientnet-pytorch and PyTorch it can come from.
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


# Where other trainings keep the state dict within a checkpoint, and what PyTorch's wrappers put before the names.
_ENTRIES = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module", "_orig_mod")  # of DataParallel, DistributedDataParallel and AveragedModel; of torch.compile
_COUNT_OF_AVERAGES = "n_averaged"  # AveragedModel's own


class _Pickled:
    """Stands for every class of _PICKLED_CLASSES: holds what the file says of an object, and does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass


class _LegacyUnpickler(pickle.Unpickler):
    """For whole modules in the format before PyTorch 1.6, which names classes in a way that weights_only refuses."""

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name in _PICKLED_CLASSES:
            # One class an object type, without source code that PyTorch could compare with the file's.
            return type(name, (_Pickled,), {"__module__": "pickled", "dump_patches": False})
        if full_name in _PICKLED_FUNCTIONS:
            return _PICKLED_FUNCTIONS[full_name]
        raise pickle.UnpicklingError(f"it names {full_name}, which is not part of an EfficientNet")


_LEGACY_PICKLE = SimpleNamespace(Unpickler=_LegacyUnpickler, __name__="pickle",
                                 load=lambda file, **kwargs: _LegacyUnpickler(file, **kwargs).load())


def read_weights(path):
    """A state dict from a file: name -> tensor. Raises UserError unless the file is one."""
    return _as_state_dict(path, load(path))


def read_module_tensors(path):
    """Like `read_weights`, and takes the published pickled EfficientNet module too, in the zip and the legacy format."""
    loaded = load(path, classes=[(_Pickled, name) for name in _PICKLED_CLASSES])
    if isinstance(loaded, _Pickled):
        try:
            loaded = dict(_tensors_of(loaded))
        except (AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: a pickled module with a structure that no module has") from error
    return _as_state_dict(path, loaded)


def load(path, classes=()):
    """What torch.save wrote, of tensors, numbers, texts and containers alone, and stand-ins of the classes. Raises UserError
    for a file that holds anything else or is damaged."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    _check_records(path)
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the parser trips over, the file is at fault
        if classes and "persistent_load" in str(error) and _is_legacy(path):
            try:
                with warnings.catch_warnings(action="ignore"):  # that it cannot compare source code
                    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_LEGACY_PICKLE)
            except Exception as legacy_error:
                error = legacy_error
        refused = re.search(r"GLOBAL (\S+)", str(error))
        said = re.search(r"WeightsUnpickler error: (.*)", str(error))  # below pages on the ways to run the file's code
        reason = (f"it names {refused[1]}, and code from a file is never run" if refused else said[1] if said
                  else str(error).splitlines()[0][:160] if str(error) else type(error).__name__)
        raise UserError(f"{path}: not a readable weights file, a PyTorch state dict is needed ({reason})") from error


def _check_records(path):
    """Compare the checksums of a zip file's records, which PyTorch does not. Raises UserError."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as records:
            if any(record.compress_type != zipfile.ZIP_STORED for record in records.infolist()):
                raise ValueError("its records are compressed, which PyTorch does not do")
            damaged = records.testzip()
        if damaged:
            raise ValueError(f"its record {damaged} is damaged")
    except Exception as error:  # as in `load`
        raise UserError(f"{path}: not a readable weights file ({error})") from error


def save(path, value):
    """torch.save, to a file that appears whole or not at all. Raises UserError where it cannot be written."""
    buffer = io.BytesIO()  # PyTorch would hide why a file cannot be written
    torch.save(value, buffer)
    with whole_file(path, "wb") as file:
        file.write(buffer.getbuffer())


def _is_legacy(path):
    """Whether a file begins as PyTorch's format before 1.6 does: a pickle of its magic number. Nothing else may: PyTorch takes
    a zip file for TorchScript, which is code."""
    with open(path, "rb") as file:
        return file.read(14) == b"\x80\x02\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def _as_state_dict(path, loaded):
    """A state dict out of what a file holds: itself, or as other trainings wrap it, within a dict and with wrappers' names
    before its own."""
    steps = []
    while isinstance(loaded, dict) and (inside := [key for key in _ENTRIES if isinstance(loaded.get(key), dict)]):
        steps.append(f"its entry '{inside[0]}'")
        loaded = loaded[inside[0]]
    if not isinstance(loaded, dict) or not loaded or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()):
        raise UserError(f"{path}: not a state dict of names and tensors, as torch.save(model.state_dict()) writes it")
    wrappers = [name for name in _WRAPPERS if any(name in key.split(".")[:-1] for key in loaded)]
    if wrappers:
        steps.append(f"without {' and '.join(f'{name}.' for name in wrappers)} in its names")
        unwrapped = type(loaded)((_unwrapped(key), value) for key, value in loaded.items() if key != _COUNT_OF_AVERAGES)
        if hasattr(loaded, "_metadata"):  # of modules, outer ones first: the wrapped ones' is what counts
            unwrapped._metadata = type(loaded._metadata)((_unwrapped(key), value) for key, value in loaded._metadata.items())
        if len(unwrapped) < sum(key != _COUNT_OF_AVERAGES for key in loaded):
            raise UserError(f"{path}: holds two tensors of one name, with and without {wrappers[0]}. before it")
        loaded = unwrapped
    if steps:
        logging.info("%s: the weights are %s", path, ", ".join(steps))
    return loaded


def _unwrapped(key):
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _tensors_of(module, prefix=""):
    members = vars(module)
    for name, tensor in [*members.get("_parameters", {}).items(), *members.get("_buffers", {}).items()]:
        if tensor is not None:
            yield prefix + name, tensor
    for name, child in members.get("_modules", {}).items():
        if isinstance(child, _Pickled):
            yield from _tensors_of(child, f"{prefix}{name}.")


def save_weights(path, state_dict, about):
    """Write a state dict and, beside it under the same name, a JSON file that says what it is."""
    with whole_file(Path(path).with_suffix(".json")) as file:
        json.dump(about, file, indent=2)
        file.write("\n")
    save(path, state_dict)  # last: weights that are there have their JSON


def read_about(path):
    """The JSON beside a weights file, {} where there is none. Raises UserError where it is not JSON."""
    path = Path(path).with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); mend it or remove it") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: not a JSON object; mend it or remove it")
    return about


def fingerprint(apr):
    """What tells an APR's weights from any other's: 16 numbers (uint8), for what is trained on its latents to keep."""
    digest = hashlib.sha256()
    for key, tensor in sorted(apr.state_dict().items()):
        if not key.endswith("num_batches_tracked"):  # which old files lack, and nothing reads
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()[:16]), dtype=torch.uint8)


def check_fingerprint(path, kept, apr, apr_path):
    """Raise UserError where the fingerprint that a file kept is of another APR; zeros, of published files, are of any."""
    if kept.any() and not torch.equal(kept.cpu(), fingerprint(apr)):
        raise UserError(f"{path}: was trained on the latents of another APR than {apr_path}; give that APR, or train anew on this one")


def describe(weights):
    """What the tensors of a checkpoint determine: {'kind': a model's name, config key: value, ...}, {} if unknown."""
    try:
        return _describe(weights)
    except (KeyError, IndexError, ValueError, TypeError):  # the names of a model with other tensors
        return {}


def _describe(weights):
    if "x_latent_fc.weight" in weights:
        backbone_type = ("efficientnet" if "backbone._conv_stem.weight" in weights else
                         "mobilenet" if "backbone.0.0.0.weight" in weights else "resnet50")
        return {"kind": "posenet", "backbone_type": backbone_type, "hidden_dim": len(weights["x_latent_fc.weight"])}
    if "query_embed_t.weight" in weights:
        num_scenes, hidden_dim = weights["query_embed_t.weight"].shape
        kind = "ms-transposenet" if "regressor_head_t.0.fc_h.weight" in weights else "ems-transposenet"
        found = {"kind": kind, "num_scenes": num_scenes, "hidden_dim": hidden_dim}
        feed_forward = weights.get("transformer_t.encoder.layers.0.linear1.weight")
        if feed_forward is not None:
            found["dim_feedforward"] = len(feed_forward)
        for branch in ("t", "rot"):
            for part in ("encoder", "decoder"):
                pattern = re.compile(rf"transformer_{branch}\.{part}\.layers\.(\d+)\.")
                layers = {match[1] for match in map(pattern.match, weights) if match}
                found[f"num_{branch}_{part}_layers"] = len(layers)
        return found
    if "x_encoder.0.weight" in weights:
        # Of the position's 3 numbers, or 4 with the scene, and the orientation's 4 or 5, each has 2 octaves + 1 features.
        x_inputs, q_inputs = (weights[f"{branch}_encoder.0.weight"].shape[1] for branch in "xq")
        n_features = q_inputs - x_inputs
        deep = "x_encoder.6.weight" in weights
        found = {"shallow_mlp": not deep, "hidden_dim": len(weights["x_encoder.6.weight" if deep else "x_encoder.2.weight"])}
        if n_features > 1:
            found["octaves"] = n_features // 2
        if x_inputs == 4 * n_features:
            found["kind"] = "multi-scene PAE"
            return {**found, "num_scenes": len(weights["scale"])} if "scale" in weights else found
        return {**found, "kind": "single-scene PAE", "apply_positional_encoding": n_features > 1}
    if "hidden.0.weight" in weights and "q_reg.weight" in weights:
        if "spread" not in weights:
            return {"kind": "a refiner of an earlier version"}
        return {"kind": "refiner", "hidden_dim": weights["hidden.0.weight"].shape[1] // 2}
    return {}


def read_checkpoint(path, kind, config):
    """Read a state dict of the given kind. Raises UserError, naming both values, where what its tensors determine
    disagrees with the config, but for numbers of layers and octaves, which are the checkpoint's."""
    weights = read_weights(path)
    found = describe(weights)
    if found.get("kind") != kind:
        holds = f"a checkpoint of {found['kind']}" if found else f"weights of no model known here (such as {next(iter(weights))})"
        raise UserError(f"{path}: {holds}, but one of {kind} is needed")
    for key, value in found.items():
        if key not in ("kind", "octaves") and not key.endswith("_layers") and key in config and config[key] != value:
            raise UserError(f"{path}: the checkpoint has {key} {value!r}, but the config says {config[key]!r}")
    return weights


def check_numbers(path, weights, own):
    """Raise UserError, naming the tensor, unless the tensors of a state dict are finite numbers of the kind that a module's own
    are."""
    for key, tensor in weights.items():
        kind = f"{tensor.dtype}".removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{path}: {key} is {'quantized' if tensor.is_quantized else 'sparse'} ({kind}); save it as a plain tensor")
        if key in own and own[key].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f"{path}: {key} has numbers of the kind {kind}, but a network's weights are floats")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} is not finite: the training that wrote it has failed")


def fill(path, module, weights):
    """Load a state dict into a module, every tensor of it. Raises UserError where they differ, or one is not finite."""
    check_numbers(path, weights, module.state_dict())
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not fit the model: {first[:200]}") from error
    logging.info("Initializing from checkpoint: %s", path)
