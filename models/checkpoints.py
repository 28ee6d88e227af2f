"""Weights: reading them from files, writing them, checking what they are, and filling modules with them."""
import hashlib
import json
import logging
import re
from pathlib import Path

import torch

from models.torch_files import load, load_module, save
from util.errors import UserError
from util.files import whole_file

# Where other trainings keep the state dict within a file, and what PyTorch's wrappers put before the names of tensors.
_ENTRIES = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module", "_orig_mod")  # of DataParallel, DistributedDataParallel and AveragedModel; of torch.compile
_COUNT_OF_AVERAGES = "n_averaged"  # a tensor of AveragedModel's own


def read_weights(path):
    """Return the state dict in a file: name -> tensor. Raises UserError if the file is none, or is damaged."""
    return _as_state_dict(path, load(path))


def read_module_tensors(path):
    """Return what `read_weights` returns, and read the published pickled EfficientNet module too."""
    return _as_state_dict(path, load_module(path))


def _as_state_dict(path, loaded):
    """Return the state dict within what a file holds, and log how it was found.

    It is the whole, or wrapped as other trainings save it: as an entry of a dict, with wrappers' names before its own.
    """
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
        unwrapped = _unwrap(loaded)
        if len(unwrapped) < sum(key != _COUNT_OF_AVERAGES for key in loaded):
            raise UserError(f"{path}: holds two tensors of the same name, with and without {wrappers[0]}. before it")
        loaded = unwrapped
    if steps:
        logging.info("%s: the weights are %s", path, ", ".join(steps))
    return loaded


def _unwrap(state_dict):
    """Return a state dict, and its metadata if it has any, without wrappers' names."""
    unwrapped = type(state_dict)((_unwrapped_name(key), value) for key, value in state_dict.items()
                                 if key != _COUNT_OF_AVERAGES)
    if hasattr(state_dict, "_metadata"):  # of modules, outer ones first: the wrapped module's replaces its wrapper's
        metadata = state_dict._metadata
        unwrapped._metadata = type(metadata)((_unwrapped_name(key), value) for key, value in metadata.items())
    return unwrapped


def _unwrapped_name(key):
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def save_weights(path, state_dict, about):
    """Write a state dict and, beside it under the same name, `about` as a JSON file."""
    with whole_file(Path(path).with_suffix(".json")) as file:
        json.dump(about, file, indent=2)
        file.write("\n")
    save(path, state_dict)  # last, so that weights always have their JSON file


def read_about(path):
    """Return the JSON object beside a weights file, or {} if there is none. Raises UserError if it is not JSON."""
    path = Path(path).with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fix it or remove it") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: not a JSON object; fix it or remove it")
    return about


def fingerprint(apr):
    """Return 16 numbers (uint8) that identify an APR's weights. What is trained on its latents keeps them."""
    digest = hashlib.sha256()
    for key, tensor in sorted(apr.state_dict().items()):
        if not key.endswith("num_batches_tracked"):  # old files lack it, and nothing reads it
            digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()[:16]), dtype=torch.uint8)


def check_fingerprint(path, kept, apr, apr_path):
    """Raise UserError if the fingerprint kept in a file is another APR's. Zeros, as in published files, fit any APR."""
    if kept.any() and not torch.equal(kept.cpu(), fingerprint(apr)):
        raise UserError(f"{path}: was trained on the latents of another APR than {apr_path}; give that APR, or train "
                        "anew on this one")


def describe(weights):
    """Return what a state dict's tensors determine: {'kind': its model, config key: value, ...}, {} if unknown.

    A kind is one of APR_NAMES, 'single-scene PAE', 'multi-scene PAE', 'refiner', 'iAPR' or 'a refiner of an earlier
    version'.
    """
    for name, describe_kind in _DESCRIPTIONS.items():
        if name in weights:
            try:
                return describe_kind(weights)
            except (KeyError, IndexError, ValueError, TypeError):  # a tensor has this name, but the rest do not fit
                return {}
    return {}


def _describe_posenet(weights):
    from models.backbones import BACKBONES  # which imports this module

    found = {"kind": "posenet", "hidden_dim": len(weights["x_latent_fc.weight"])}
    for name, backbone in BACKBONES.items():
        if f"backbone.{backbone.marker}" in weights:
            found["backbone_type"] = name
    return found


def _describe_ms_transformer(weights):
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


def _describe_pose_encoder(weights):
    # An MLP's inputs: 3 numbers of a position or 4 of a quaternion, 1 more in a multi-scene PAE for the scene, and for
    # each number 2 octaves + 1 features. So the two MLPs' inputs differ by one number's features.
    x_inputs, q_inputs = (weights[f"{branch}_encoder.0.weight"].shape[1] for branch in "xq")
    n_features = q_inputs - x_inputs
    deep = "x_encoder.6.weight" in weights
    last_layer = weights["x_encoder.6.weight" if deep else "x_encoder.2.weight"]
    found = {"shallow_mlp": not deep, "hidden_dim": len(last_layer)}
    if n_features > 1:
        found["octaves"] = n_features // 2
    if x_inputs == 4 * n_features:
        found["kind"] = "multi-scene PAE"
        if "scale" in weights:
            found["num_scenes"] = len(weights["scale"])
        return found
    return {**found, "kind": "single-scene PAE", "apply_positional_encoding": n_features > 1}


def _describe_refiner(weights):
    if "q_reg.weight" not in weights:
        return {}
    if "spread" not in weights:
        return {"kind": "a refiner of an earlier version"}
    return {"kind": "refiner", "hidden_dim": weights["hidden.0.weight"].shape[1] // 2}


def _describe_iapr(weights):
    inside = {key.removeprefix("mstransformer."): value for key, value in weights.items()
              if key.startswith("mstransformer.")}
    return {**_describe_ms_transformer(inside), "kind": "iAPR"}


# A tensor that only one family of models has: the family's description.
_DESCRIPTIONS = {
    "x_latent_fc.weight": _describe_posenet,
    "query_embed_t.weight": _describe_ms_transformer,
    "rel_x_token": _describe_iapr,
    "x_encoder.0.weight": _describe_pose_encoder,
    "hidden.0.weight": _describe_refiner,
}


def read_checkpoint(path, kind, config):
    """Read a state dict of the given kind, as `describe` names kinds.

    Raises UserError, naming both values, if what the tensors determine disagrees with the config. Numbers of layers and
    octaves may disagree: there the checkpoint decides.
    """
    weights = read_weights(path)
    found = describe(weights)
    if found.get("kind") != kind:
        holds = (f"a checkpoint of {found['kind']}" if found else
                 f"weights of no model known here (one tensor is {next(iter(weights))})")
        raise UserError(f"{path}: {holds}, but one of {kind} is needed")
    for key, value in found.items():
        if key not in ("kind", "octaves") and not key.endswith("_layers") and key in config and config[key] != value:
            raise UserError(f"{path}: the checkpoint has {key} {value!r}, but the config says {config[key]!r}")
    return weights


def check_numbers(path, weights, own):
    """Raise UserError, naming the tensor, unless a state dict holds finite numbers of the same kind as a module's own.

    own: the module's state dict. A float there needs a float; a sparse or quantized tensor is never accepted.
    """
    for key, tensor in weights.items():
        kind = f"{tensor.dtype}".removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            storage = "quantized" if tensor.is_quantized else "sparse"
            raise UserError(f"{path}: {key} is {storage} ({kind}); save it as a plain tensor")
        if key in own and own[key].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f"{path}: {key} has numbers of the kind {kind}, but a network's weights are floats")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} is not finite: the training that wrote it has failed")


def fill(path, module, weights):
    """Load a state dict into a module, all tensors of both. Raises UserError if names, shapes or numbers do not fit."""
    check_numbers(path, weights, module.state_dict())
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: does not fit the model: {first[:200]}") from error
    logging.info("Initializing from checkpoint: %s", path)
