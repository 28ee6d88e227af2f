"""Hyper-parameters: config.json, its presets, and what --set changes."""
import difflib
import json
import logging

from util.errors import UserError


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 31


def _names(value):
    return (isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)
            and len(set(value)) == len(value))


_FLAG = ("true or false", lambda value: isinstance(value, bool))
_COUNT = ("a whole number of at least 1", lambda value: _whole(value) and value >= 1)
_COUNT_OR_0 = ("a whole number of at least 0", lambda value: _whole(value) and value >= 0)
_NUMBER = ("a number", _number)
_NUMBER_OR_0 = ("a number of at least 0", lambda value: _number(value) and value >= 0)
_POSITIVE = ("a number above 0", lambda value: _number(value) and value > 0)
_NAMES = ("a list of different names", _names)


def _choice(*values):
    return ("one of " + ", ".join(map(json.dumps, values)), lambda value: value in values)


# Every key, what its value must be, and whether a value is that.
KEYS = {
    "n_freq_print": _COUNT, "n_freq_checkpoint": _COUNT, "n_freq_validate": _COUNT, "n_workers": _COUNT_OR_0,
    "device_id": ("a device's name", lambda value: isinstance(value, str)),
    "precision": _choice("fp32", "bf16", "fp16", "auto"), "cache_memory_gb": _NUMBER_OR_0,
    "batch_size": _COUNT, "test_batch_size": _COUNT, "latent_views": _COUNT_OR_0, "equalize_scenes": _FLAG, "num_scenes": _COUNT, "scene_names": _NAMES,
    "learnable": _FLAG, "s_x": _NUMBER, "s_q": _NUMBER, "norm": ("1 or 2", lambda value: _number(value) and value in (1, 2)),
    "lr": _POSITIVE, "weight_decay": _NUMBER_OR_0, "eps": _NUMBER_OR_0,
    "average_last": ("a number from 0 to below 1", lambda value: _number(value) and 0 <= value < 1),
    "lr_scheduler_step_size": _COUNT, "lr_scheduler_gamma": _POSITIVE, "n_epochs": _COUNT,
    "num_t_encoder_layers": _COUNT_OR_0, "num_t_decoder_layers": _COUNT_OR_0,
    "num_rot_encoder_layers": _COUNT_OR_0, "num_rot_decoder_layers": _COUNT_OR_0,
    "dim_feedforward": _COUNT, "hidden_dim": _COUNT, "nhead": _COUNT, "nheads": _COUNT,
    "reduction": ("a list of two endpoints, which may be the same",
                  lambda value: isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)),
    "dropout": ("a number from 0 to below 1", lambda value: _number(value) and 0 <= value < 1),
    "freeze": _FLAG, "no_augment": _FLAG,
    "freeze_exclude_phrase": ("a phrase or a list of phrases", lambda value: isinstance(value, str) or _names(value)),
    "backbone_type": _choice("efficientnet", "resnet50", "mobilenet"),
    "shallow_mlp": _FLAG, "apply_positional_encoding": _FLAG, "octaves": _COUNT, "pae_input": _choice("estimated", "true"),
    "num_neighbors": _COUNT, "test_optim_iterations": _COUNT_OR_0, "refine_orientation": _choice(None, "affine", "eigen"),
    "single_scene": _FLAG,  # of the published refinement; nothing reads it here
}


class Config(dict):
    """The hyper-parameters of a run: key -> value. A required key that is missing is the user's error."""

    source = "the config"
    given = frozenset()  # the keys that --set gave

    def __missing__(self, key):
        raise UserError(f"{self.source}: the required key '{key}' is missing; add it or give --set {key}=VALUE")


def load_config(path, model_name, sections_after=(), preset=None, overrides=()):
    """Read a config file for a model: `general` < the model's section < preset < `sections_after` < overrides.

    sections_after: names of sections, of 'pose_encoder' and 'refiner'; one that the file lacks is left out.
    overrides: 'key=value' strings.

    A file without presets is taken for a published one, where `general` wins over the model's section. Raises UserError
    for a file that is not JSON, unknown sections, presets and keys, and values of the wrong type.
    """
    try:
        with open(path) as file:
            sections = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON config: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(sections, dict):
        raise UserError(f"{path}: not a JSON object with the sections 'general' and '{model_name}'")
    parts = [_section(path, sections, "general"), _section(path, sections, model_name)]
    if "presets" not in sections:
        parts.reverse()
    if preset is not None:
        parts.append(_preset(path, sections, preset, model_name))
    parts += [_section(path, sections, name) for name in sections_after if name in sections]

    config = Config()
    config.source = f"{path}, section '{model_name}'"
    for part in parts:
        config.update(part)
    unknown = sorted(set(config) - set(KEYS))
    if unknown:
        logging.info("Config keys that nothing reads: %s", ", ".join(unknown))
    for key in set(config) & set(KEYS):
        _check(path, key, config[key])
    for override in overrides:
        key, value = _parse(override)
        config[key] = value
        config.given |= {key}
    if "nheads" in config:
        logging.info("Config key nheads is ignored, as in the published code, which reads nhead (now %s): "
                     "the published checkpoints have 8 heads", config.get("nhead", 8))
    if "scene_names" in config and "num_scenes" in config:
        check_scene_names(config.source, config["scene_names"], config["num_scenes"])
    return config


def check_scene_names(source, scene_names, num_scenes):
    """Raise UserError unless `scene_names` can be the scenes of a model of `num_scenes`."""
    if not _names(scene_names):
        raise UserError(f"{source}: scene_names is {json.dumps(scene_names)}, but it must be {_NAMES[0]}")
    if len(scene_names) > num_scenes:
        raise UserError(f"{source}: scene_names has {len(scene_names)} names but num_scenes is {num_scenes}; give both with "
                        f"--set, or no preset")


def _section(path, sections, name):
    if name not in sections:
        raise UserError(f"{path}: section '{name}' is missing; the file has {', '.join(sections) or 'none'}")
    if not isinstance(sections[name], dict):
        raise UserError(f"{path}: section '{name}' is not a JSON object of keys and values")
    return sections[name]


def _preset(path, sections, preset, model_name):
    presets = _section(path, {"presets": {}, **sections}, "presets")
    if preset not in presets:
        raise UserError(f"{path}: unknown preset '{preset}'; the file has {', '.join(presets) or 'none'}")
    values = _section(path, presets, preset)
    of_models = {key: value for key, value in values.items() if isinstance(value, dict)}
    if model_name not in of_models:
        raise UserError(f"{path}: preset '{preset}' is not for {model_name}, but for {', '.join(of_models) or 'none'}")
    return {**{key: value for key, value in values.items() if key not in of_models}, **of_models[model_name]}


def _parse(override):
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set {override}: not of the form key=value")
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, n=1)
        raise UserError(f"--set {override}: unknown key '{key}'" + (f"; did you mean {close[0]}?" if close else ""))
    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        value = text
    if not KEYS[key][1](value) and KEYS[key][1](text):
        value = text  # a name that looks like a number or a word of JSON, such as pae_input=true
    _check("--set", key, value)
    return key, value


def _check(source, key, value):
    description, accepts = KEYS[key]
    if not accepts(value):
        raise UserError(f"{source}: {key} is {json.dumps(value)}, but it must be {description}")
