"""Resuming a training: its state files, and what must be as it was.

States are written after whole epochs; the last two are kept.
"""
import glob
import json
import logging
import os
import re
import shlex
import sys
from contextlib import suppress

from util import processes
from util.config import KEYS
from util.errors import UserError
from util.files import sha256

LATEST = "latest"
_STAMP = r"\d\d(?:_\d\d){4}(?:_\d+)?"
# What may differ in a resumed training: nothing of it changes the result.
_FREE = ("n_freq_print", "n_freq_checkpoint", "n_freq_validate", "n_workers", "device_id", "cache_memory_gb")
# The entries of a state file, which engine/training_state.py writes and restores.
_TYPES = {
    "weights": dict, "loss": dict, "optimizer": dict, "scaler": dict, "average": dict, "random": dict,
    "norm_counters": list, "epoch": int, "losses": object, "curves": list, "best": list,
    "average_start": (int, float), "scene_names": object, "settings": str,
}
KEPT = 2


def find(output_dir, name, suffix):
    """The prefix of the run that --resume names: DIR/run_<stamp>.

    name: a stamp, or 'latest' for the run of this script (whose files have the suffix) that wrote a state last. Raises
    UserError where nothing can be resumed.
    """
    stamp = re.fullmatch(f"(?:run_)?({_STAMP})", name)
    if stamp:
        prefix = os.path.join(output_dir, f"run_{stamp[1]}")
        if _states(prefix + suffix):
            return prefix
        if os.path.exists(f"{prefix}{suffix}_final.pth"):
            raise UserError(f"--resume {name}: this training is finished, its weights are {prefix}{suffix}_final.pth")
        raise UserError(f"--resume {name}: {output_dir} has no training of that stamp by this script with a whole "
                        "epoch; start it again without --resume")
    if name != LATEST:
        raise UserError(f"--resume {name}: neither 'latest' nor a stamp such as 24_12_31_23_59, as in a run's "
                        "run_<stamp>.log")
    states = [path for path in glob.glob(os.path.join(glob.escape(output_dir), "run_*_resume-*.pth"))
              if re.fullmatch(rf"run_{_STAMP}{suffix}_resume-\d+\.pth", os.path.basename(path))]
    if not states:
        raise UserError(f"--resume latest: {output_dir} has no unfinished training by this script with a whole epoch; "
                        "start it without --resume")
    latest = max(states, key=os.path.getmtime)
    return os.path.join(output_dir, re.match(f"run_{_STAMP}", os.path.basename(latest))[0])


def settings_of(model_name, seed, config, files):
    """What determines a training's result, as JSON: the config and the seed, and digests of the files it learns from.

    files: option's name -> path.
    """
    return json.dumps({"model": model_name, "seed": seed, "config": config,
                       "files": {name: _digest(path) for name, path in files.items()}})


def read(prefix):
    """The newest state that is whole, read in full with its checksums compared. Raises UserError where none is."""
    problems = []
    for epoch, path in _states(prefix):
        try:
            return _read(path, epoch)
        except UserError as error:
            problems.append(str(error))
            logging.warning("%s; resuming from the state before it, if it exists", error)
    if not problems:
        raise UserError(f"--resume: {prefix} has been finished meanwhile")
    raise UserError(f"{problems[0]}; no other state of this training is whole: start it again, or from one of its "
                    "checkpoints with --checkpoint_path")


def check_settings(state, settings, given):
    """Raise UserError where a setting that determines the result has changed.

    given: the config keys that --set names now, which may change.
    """
    before, now = json.loads(state["settings"]), json.loads(settings)
    for name in {**before["files"], **now["files"]}:
        if (name in before["files"]) != (name in now["files"]):
            raise UserError(f"--resume: this training began {'with' if name in before['files'] else 'without'} "
                            f"--{name}; give the options as they were")
        if before["files"].get(name) != now["files"].get(name):
            raise UserError(f"--resume: the content of the {str(name).replace('_', ' ')} is not what it was when this "
                            "training began; give the file as it was, or start a new training")
    for key in ("model", "seed"):
        if before.get(key) != now[key]:
            raise UserError(f"--resume: the {key} was {before.get(key)} and is {now[key]} now; give it as it was")
    changed = [key for key in KEYS if key not in _FREE and key not in given
               and before["config"].get(key) != now["config"].get(key)]
    if changed:
        def value(config, key):
            return json.dumps(config[key]) if key in config else "not given"

        listed = ", ".join(f"{key} was {value(before['config'], key)} and is {value(now['config'], key)} now"
                           for key in changed)
        raise UserError(f"--resume: {listed}; give the settings as they were, or name each with --set to change it")


def write(prefix, state):
    """Write a state after state['epoch'] epochs.

    The last KEPT states stay; older ones, and those of later epochs, which were damaged, are removed.
    """
    from models.checkpoints import save

    save(f"{prefix}_resume-{state['epoch']}.pth", state)
    kept = [path for epoch, path in _states(prefix) if epoch <= state["epoch"]][:KEPT]
    _remove(path for _, path in _states(prefix) if path not in kept)


def remove(prefix):
    """Remove a finished training's states."""
    _remove(path for _, path in _states(prefix))


def advice(run):
    """A sentence that says how to resume a training that has ended early."""
    states = _states(run.prefix)
    if not states and os.path.exists(f"{run.prefix}_final.pth"):
        return f"it was finished: {run.prefix}_final.pth"
    if not states:
        return "no whole epoch is saved: start it again"
    words = sys.argv[1:]
    for i in [i for i, word in enumerate(words) if word.split("=")[0] == "--resume"]:
        del words[i:i + (1 if "=" in words[i] else 2)]
    stamp = re.search(f"run_({_STAMP})", os.path.basename(run.prefix))[1]
    command = shlex.join([sys.argv[0], *words, "--resume", stamp])
    return f"it is saved up to epoch {states[0][0]}; resume it with: {processes.launcher()} {command}"


def _remove(paths):
    for path in paths:
        with suppress(OSError):
            os.remove(path)


def _states(prefix):
    """(epochs, path) of a run's states, newest first."""
    paths = glob.glob(glob.escape(prefix) + "_resume-*.pth")
    matches = [(re.fullmatch(r".*_resume-(\d+)\.pth", path), path) for path in paths]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _read(path, epoch):
    from models.checkpoints import load

    state = load(path)
    if not (isinstance(state, dict) and set(state) == set(_TYPES)
            and all(isinstance(state[key], kind) for key, kind in _TYPES.items()) and state["epoch"] == epoch):
        raise UserError(f"{path}: not the state of a training after {epoch} epochs, or one of another version")
    try:
        settings = json.loads(state["settings"])
        settings["config"].keys(), settings["files"].keys()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its settings are damaged") from error
    return state


def _digest(path):
    try:
        return sha256(path)
    except OSError:  # reported where the file is read
        return None
