"""What a label file's poses mean: FILE.json, beside FILE.csv, says the unit and the convention."""
import json
from pathlib import Path

from datasets.official import CONVENTIONS, convention_of_scenes
from util.errors import UserError
from util.files import whole_file

UNITS = ("m", "model units")
KEYS = {"unit": UNITS, "convention": tuple(CONVENTIONS)}


def describe(path):
    """What a label file's poses mean: {'unit': of their positions, and perhaps 'convention': of their quaternions}.

    Unless the JSON beside it says it, the unit is 'm'. The unit is of UNITS, the convention of official.CONVENTIONS.
    Raises UserError for others.
    """
    path = Path(path).with_suffix(".json")
    said = _content(path)
    about = {"unit": "m", **{key: said[key] for key in KEYS if said.get(key) is not None}}
    for key, allowed in KEYS.items():
        if key in about and about[key] not in allowed:
            raise UserError(f"{path}: {key} {json.dumps(about[key])} is unknown; it must be "
                            + " or ".join(map(json.dumps, allowed)))
    return about


def _content(path):
    """The JSON object in a file: a dict, empty without a file. Raises UserError for anything else."""
    try:
        about = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON, such as {{\"unit\": \"m\"}}: "
                        f"{getattr(error, 'strerror', None) or error}") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: not a JSON object, such as {{\"unit\": \"m\"}}")
    return about


def read_unit(path):
    """The unit of a label file's positions; see `describe`."""
    return describe(path)["unit"]


def read_convention(path, scenes):
    """The convention of a label file's quaternions, or None where it is unknown: of `describe`, or by its scenes."""
    return describe(path).get("convention") or convention_of_scenes(scenes)


def check_place(path):
    """Raise UserError where the description of a label file to be written would overwrite something else."""
    beside = Path(path).with_suffix(".json")
    if beside == Path(path):
        raise UserError(f"{path}: a label file is a .csv file; its description goes to the .json file beside it")
    try:
        is_ours = not beside.exists() or set(_content(beside)) <= set(KEYS)
    except UserError:
        is_ours = False
    if not is_ours:
        raise UserError(f"{path}: its description would overwrite {beside}, which is no label file's; name another")


def write_description(path, description, scenes):
    """Write what `describe` reads beside a label file, where its scenes alone do not say it, or over an earlier one."""
    beside = Path(path).with_suffix(".json")
    implied = {"unit": "m", "convention": convention_of_scenes(scenes)}
    if {**implied, **description} != implied or beside.exists():
        with whole_file(beside) as file:
            file.write(json.dumps(description) + "\n")
