"""Hyper-parameters: config.json, its presets, and what --set changes."""
import difflib
import json
import logging

from util.errors import UserError


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2 ** 31


def _is_list_of_strings(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_names(value):
    return _is_list_of_strings(value) and 0 < len(value) == len(set(value))


# Kinds of values: what a value must be, and whether one is that.
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_COUNT = ("a whole number of at least 1", lambda value: _is_integer(value) and value >= 1)
_COUNT_OR_0 = ("a whole number of at least 0", lambda value: _is_integer(value) and value >= 0)
_NUMBER = ("a number", _is_number)
_NUMBER_OR_0 = ("a number of at least 0", lambda value: _is_number(value) and value >= 0)
_POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0)
_FRACTION = ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_NORM = ("1 or 2", lambda value: _is_number(value) and value in (1, 2))
_DEVICE = ("a device's name", lambda value: isinstance(value, str))
_NAMES = ("a list of different names", _are_names)
_PHRASES = ("a phrase or a list of phrases", lambda value: isinstance(value, str) or _are_names(value))
_ENDPOINTS = ("a list of two endpoints, which may be the same",
              lambda value: _is_list_of_strings(value) and len(value) == 2)


def _choice(*values):
    return ("one of " + ", ".join(map(json.dumps, values)), lambda value: value in values)


# Every key, and the kind of its values.
KEYS = {
    # any run
    "n_freq_print": _COUNT, "n_freq_checkpoint": _COUNT, "n_freq_validate": _COUNT, "n_workers": _COUNT_OR_0,
    "device_id": _DEVICE, "precision": _choice("fp32", "bf16", "fp16", "auto"),
    "batch_size": _COUNT, "test_batch_size": _COUNT, "cache_memory_gb": _NUMBER_OR_0,
    # training
    "lr": _POSITIVE, "weight_decay": _NUMBER_OR_0, "eps": _NUMBER_OR_0, "n_epochs": _COUNT,
    "lr_scheduler_step_size": _COUNT, "lr_scheduler_gamma": _POSITIVE, "average_last": _FRACTION,
    "learnable": _FLAG, "s_x": _NUMBER, "s_q": _NUMBER, "norm": _NORM,
    "equalize_scenes": _FLAG, "no_augment": _FLAG, "freeze": _FLAG, "freeze_exclude_phrase": _PHRASES,
    # APRs
    "backbone_type": _choice(
        "efficientnet",
        "resnet50",
        "mobilenet",
    ),
    "reduction": _ENDPOINTS,
    "num_scenes": _COUNT, "scene_names": _NAMES, "hidden_dim": _COUNT, "dim_feedforward": _COUNT,
    "nhead": _COUNT, "nheads": _COUNT, "dropout": _FRACTION,
    "num_t_encoder_layers": _COUNT_OR_0, "num_t_decoder_layers": _COUNT_OR_0,
    "num_rot_encoder_layers": _COUNT_OR_0, "num_rot_decoder_layers": _COUNT_OR_0,
    # PAEs
    "shallow_mlp": _FLAG, "apply_positional_encoding": _FLAG, "octaves": _COUNT,
    "pae_input": _choice("estimated", "true"),
    # refinement
    "num_neighbors": _COUNT, "nearest_by": _choice("pose", "published"),
    "test_optim_iterations": _COUNT_OR_0, "num_iterations": _COUNT_OR_0,
    "refine_orientation": _choice(None, "affine", "eigen"),
    "single_scene": _FLAG,  # a key of the published refinement, which nothing reads here
}

# The values of keys that a config lacks. Published config files lack all keys that only exist here.
DEFAULTS = {
    # any run
    "n_freq_validate": 1, "device_id": "cuda:0", "precision": "fp32", "test_batch_size": 32,
    "cache_memory_gb": None,  # a quarter of the free memory
    # training
    "average_last": 0, "equalize_scenes": False, "no_augment": False, "freeze": False,
    # APRs
    "scene_names": None,  # taken from the checkpoint's JSON or the label file
    "nhead": 8, "dropout": 0.1, "reduction": ["reduction_4", "reduction_3"],
    "num_t_encoder_layers": 6, "num_t_decoder_layers": 6, "num_rot_encoder_layers": 6, "num_rot_decoder_layers": 6,
    # PAEs
    "shallow_mlp": False, "apply_positional_encoding": True, "octaves": 6, "pae_input": "estimated",
    # refinement
    "num_neighbors": 3, "nearest_by": "pose", "test_optim_iterations": 3, "num_iterations": 3,
    "refine_orientation": None,
}


class Config(dict):
    """The hyper-parameters of a run: key -> value.

    config[key] is the value in DEFAULTS if the config lacks the key. Raises UserError if DEFAULTS lacks it too.
    """

    def __init__(self, values=()):
        """Copy values. `source` says in messages where they are from; `given` are the keys of --set."""
        super().__init__(values)
        self.source = getattr(values, "source", "the config")
        self.given = getattr(values, "given", frozenset())

    def __missing__(self, key):
        if key in DEFAULTS:
            return DEFAULTS[key]
        raise UserError(f"{self.source}: the required key '{key}' is missing; add it or give --set {key}=VALUE")


def load_config(path, model_name, sections_after=(), preset=None, overrides=()):
    """Return the Config of a model from a config file.

    Later parts win: section `general`, the model's section, preset, `sections_after`, overrides. A file without presets
    is taken for a published one, where `general` wins over the model's section.

    sections_after: names of sections, 'pose_encoder' or 'refiner'. A file may lack them.
    overrides: 'key=value' strings, as after --set.

    Raises UserError for a file that is not JSON, for missing sections, unknown presets and unknown keys in overrides,
    and for values of the wrong type.
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
                     "the published checkpoints have 8 heads", config["nhead"])
    if "scene_names" in config and "num_scenes" in config:
        check_scene_names(config.source, config["scene_names"], config["num_scenes"])
    return config


def check_scene_names(source, scene_names, num_scenes):
    """Raise UserError unless `scene_names` can be the scenes of a model with `num_scenes` scenes.

    source: where the names are from, for the error message.
    """
    if not _are_names(scene_names):
        raise UserError(f"{source}: scene_names is {json.dumps(scene_names)}, but it must be {_NAMES[0]}")
    if len(scene_names) > num_scenes:
        raise UserError(f"{source}: scene_names has {len(scene_names)} names but num_scenes is {num_scenes}; give both "
                        "with --set, or no preset")


def _section(path, sections, name):
    """Return a section of a config file, a dict. Raises UserError if the file lacks it."""
    if name not in sections:
        raise UserError(f"{path}: section '{name}' is missing; the file has {', '.join(sections) or 'none'}")
    if not isinstance(sections[name], dict):
        raise UserError(f"{path}: section '{name}' is not a JSON object of keys and values")
    return sections[name]


def _preset(path, sections, preset, model_name):
    """Return a preset's keys for all models and for this one. Raises UserError if it is unknown or for other models."""
    presets = _section(path, {"presets": {}, **sections}, "presets")
    if preset not in presets:
        raise UserError(f"{path}: unknown preset '{preset}'; the file has {', '.join(presets) or 'none'}")
    values = _section(path, presets, preset)
    models = {key: value for key, value in values.items() if isinstance(value, dict)}
    if model_name not in models:
        raise UserError(f"{path}: preset '{preset}' is not for {model_name}, but for {', '.join(models) or 'none'}")
    return {**{key: value for key, value in values.items() if key not in models}, **models[model_name]}


def _parse(override):
    """Return the key and the value of 'key=value'. Raises UserError if the key is unknown or the value is wrong."""
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
