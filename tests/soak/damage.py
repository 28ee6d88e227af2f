"""Damaged input files: a script finishes or ends in one clear line with exit status 2.

Whatever a file holds, a script changes no input and runs no code from it. All paths are relative to the working
directory, which `write_inputs` fills.
"""
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import traceback
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from conftest import COLUMNS, ROOT
from PIL import Image
from tqdm import tqdm

from engine import resume
from models import get_model
from models.checkpoints import save_weights
from models.pose_encoder import PoseEncoder
from models.pose_refiner import PoseRefiner

SECONDS = 600  # a run that takes longer hangs
MARK = "code-ran"
FINISHED, CLEAR_LINE = "finished", "a clear line"
MODEL = {"hidden_dim": 16, "num_scenes": 1, "dim_feedforward": 8, "nhead": 2, "backbone_type": "mobilenet",
         **{f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}}
WAYS = ("truncated", "a bit flipped", "bits flipped", "emptied", "noise", "a block of zeros", "a block lost",
        "swapped", "hostile")


class _MarksItsRun:
    """An object whose unpickling makes the folder MARK."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


class _Hangs(BaseException):
    """A run takes too long."""


def run_all(folder, n, seed, n_processes=2):
    """Damage n files, of every kind in turn, and run a script on each.

    Returns {kind: {outcome: its count}}. Raises AssertionError with the failures.
    """
    cases = [(kind, seed * 1000000 + i) for i, kind in zip(range(n), itertools.cycle(sorted(KINDS)))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, _start_process, (str(folder),)) as pool:
        outcomes = list(tqdm(pool.map(run_case, *zip(*cases)), total=n, disable=None, unit="case"))
    failures = [f"{kind} (case {number}, {way}): {outcome}" for (kind, number), (outcome, way) in zip(cases, outcomes)
                if outcome not in (FINISHED, CLEAR_LINE)]
    assert not failures, "\n\n".join(failures)
    counts = {kind: Counter() for kind in sorted(KINDS)}
    for (kind, _), (outcome, _) in zip(cases, outcomes):
        counts[kind][outcome] += 1
    return {"seed": seed, "cases": n, **{kind: dict(sorted(count.items())) for kind, count in counts.items()}}


def run_case(kind, number):
    """Damage a file of a kind, as the case's number draws it, run its script, and restore all files.

    Returns what happened (FINISHED or CLEAR_LINE where all is well) and how the file was damaged.
    """
    rng = random.Random(number)
    path, command = KINDS[kind]
    path = Path(path())
    kept = {file: file.read_bytes() for file in _files() if file.suffix != ".log"}
    way, data = _damaged(rng, path, kept)
    path.write_bytes(data)
    if kind == "both states":
        other = Path(_state(newest=False))
        other.write_bytes(_damaged(rng, other, kept)[1])
    before = {file: zlib.crc32(file.read_bytes()) for file in _files()}
    try:
        outcome = _run(command)
        after = {file: zlib.crc32(file.read_bytes()) if file.exists() else None for file in before}
        # A run may finish a training, and repair a cache of its own.
        if any(before[file] != after[file] for file in before if file.parts[0] not in ("out", "cache")):
            outcome = "an input has changed"
        if os.path.exists(MARK):
            outcome = "code ran"
    finally:
        shutil.rmtree(MARK, ignore_errors=True)
        for file in _files():
            if file not in kept:
                file.unlink()
        for file, content in kept.items():
            file.write_bytes(content)
    return outcome, way


def write_inputs():
    """Write good files of all kinds to the working directory."""
    _write_frames()
    _write_config()
    apr = get_model("posenet", "none", MODEL)
    torch.save(apr.state_dict(), "posenet.pth")
    torch.save(apr.backbone.state_dict(), "backbone.pth")
    transposenet = get_model("ems-transposenet", "none", MODEL)
    save_weights("ems-transposenet.pth", transposenet.state_dict(), {"scene_names": ["attic"]})
    torch.save(PoseEncoder(16).state_dict(), "pae.pth")
    torch.save(PoseRefiner(16).state_dict(), "refiner.pth")
    _run_well(_test("--cache_dir", "cache"))
    _write_states()


def _start_process(folder):
    """Make a folder of good files for this process of the pool, and go there."""
    torch.set_num_threads(1)
    home = Path(folder) / f"process-{os.getpid()}"
    home.mkdir(parents=True)
    os.chdir(home)
    write_inputs()


def _write_frames():
    """Write four frames of noise with random poses, three of them PNG and one JPEG."""
    rng = random.Random(0)
    lines = [COLUMNS]
    for i in range(4):
        name = f"attic/seq-01/frame-{i:06d}.color.{'png' if i < 3 else 'jpg'}"
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3)).resize((320, 240)).save(name)
        lines.append(f"attic,train,seq-01,{name}," + ",".join(f"{rng.uniform(0.1, 1):.7f}" for _ in range(7)))
    Path("labels.csv").write_text("\n".join(lines) + "\n")


def _write_config():
    section = {**MODEL, "batch_size": 2, "learnable": True, "s_x": 0, "s_q": 0, "norm": 2, "lr": 1e-3,
               "weight_decay": 0, "eps": 1e-8, "lr_scheduler_step_size": 1, "lr_scheduler_gamma": 0.5, "n_epochs": 3}
    Path("config.json").write_text(json.dumps({
        "general": {"n_freq_print": 1, "n_freq_checkpoint": 10, "n_workers": 0}, "presets": {},
        "posenet": section, "ems-transposenet": section}))


def _write_states():
    """Write the states after the first two epochs of a training, as if it had been killed then."""
    write, remove = resume.write, resume.remove
    resume.write = lambda prefix, state: write(prefix, state) if state["epoch"] < 3 else None
    resume.remove = lambda prefix: None
    try:
        _run_well(_train())
        _run_well(_train("--resume", "latest"))  # not every short epoch is saved; the first after resuming is
    finally:
        resume.write, resume.remove = write, remove
    for path in Path("out").glob("*_final*"):
        path.unlink()


def _test(*more, model="posenet", script="main.py", weights=None):
    """The command of a test. weights: its arguments instead of the model's --checkpoint_path."""
    weights = weights or ["--checkpoint_path", f"{model}.pth"]
    return [script, model, "test", "none", ".", "labels.csv", "config.json", *weights, *more]


def _train(*more, backbone="none"):
    return ["main.py", "posenet", "train", backbone, ".", "labels.csv", "config.json", *more]


def _state(newest):
    """The path of the newer or of the older of the two states."""
    states = sorted(Path("out").glob("*_resume-*.pth"), key=lambda path: int(path.stem.rsplit("-", 1)[1]))
    return str(states[-1 if newest else 0])


# Kind of file -> (a function that returns its path, the command that reads it)
KINDS = {
    "APR": (lambda: "posenet.pth", _test()),
    "backbone": (lambda: "backbone.pth", _train("--set", "n_epochs=1", backbone="backbone.pth")),
    "PAE": (lambda: "pae.pth", _test(script="main_learn_pose_encoding.py",
                                     weights=["posenet.pth", "--encoder_checkpoint_path", "pae.pth"])),
    "refiner": (lambda: "refiner.pth", _test(script="main_refine_apr.py", weights=[
        "posenet.pth", "pae.pth", "--rpr_checkpoint_path", "refiner.pth"])),
    "JSON beside weights": (lambda: "ems-transposenet.json", _test(model="ems-transposenet")),
    "labels": (lambda: "labels.csv", _test()),
    "config": (lambda: "config.json", _train("--set", "n_epochs=1")),
    "PNG image": (lambda: "attic/seq-01/frame-000001.color.png", _test()),
    "JPEG image": (lambda: "attic/seq-01/frame-000003.color.jpg", _train("--set", "n_epochs=1")),
    "cached frames": (lambda: str(next(Path("cache").iterdir())), _test("--cache_dir", "cache")),
    "newest state": (lambda: _state(newest=True), _train("--resume", "latest")),
    "both states": (lambda: _state(newest=True), _train("--resume", "latest")),
}


def _files():
    return [path for path in Path(".").rglob("*") if path.is_file()]


def _damaged(rng, path, files):
    """Draw a way to damage a file; returns it and the file's new content. files: path -> content, of all files."""
    data = bytearray(files[path])
    way = rng.choice(WAYS)
    at = rng.randrange(len(data))
    if way == "truncated":
        data = data[:at]
    elif way in ("a bit flipped", "bits flipped"):
        for _ in range(1 if way == "a bit flipped" else rng.randrange(2, 50)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "emptied":
        data = b""
    elif way == "noise":
        data = rng.randbytes(rng.randrange(1, 5000))
    elif way == "a block of zeros":
        end = min(at + rng.randrange(1, 5000), len(data))
        data[at:end] = bytes(end - at)
    elif way == "a block lost":
        del data[at:at + rng.randrange(1, 5000)]
    elif way == "swapped":
        data = files[rng.choice([other for other in sorted(files) if other != path])]
    elif "_resume-" in path.name and rng.random() < 0.7:
        way, data = _state_with_junk(rng, data)
    else:
        data = rng.choice(_hostile())
    return way, bytes(data)


def _state_with_junk(rng, data):
    """A state of which one entry is replaced; returns how, and the file's new content."""
    state = torch.load(io.BytesIO(data))
    entry = rng.choice(sorted(state))
    junk = [None, -1, 3, "x", "[]", "[" * 100000, [], [1], {}, {0: 1}, {0: {}}, {0: {"step": torch.ones(())}},
            torch.zeros(2, 1), torch.ones(3)]
    state[entry] = rng.choice(junk)
    if rng.random() < 0.3 and isinstance(state["optimizer"], dict) and state["optimizer"]:
        state["optimizer"][0] = rng.choice(junk)
    return f"a state with another {entry}", _saved(state)


def _saved(value, zipped=True):
    """The content of the file that torch.save writes. zipped: in the format since PyTorch 1.6."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _hostile():
    """Files that would run code, or exhaust a careless parser."""
    mark = _MarksItsRun()
    state = {"epoch": 2, "weights": mark, "settings": "{}"}
    header = f"{COLUMNS}\n".encode()
    return [
        _saved({"x_reg.weight": mark}), _saved({"x_reg.weight": mark}, zipped=False), pickle.dumps(mark),
        pickle.dumps({"a": mark}, 0), _saved(state), _saved(mark, zipped=False), _saved({"epoch": 2}),
        _saved({"x_reg.weight": torch.full((3, 16), torch.nan)}),
        b"[" * 100000, b'{"a":' * 100000,
        b'{"general": {"n_epochs": 1e999, "batch_size": ' + b"9" * 5000 + b"}}",
        b'{"scene_names": [null, 3]}', b"null", b"\xff\xfe\x00",
        header + b'"' * 200000,
        header + b"attic,train,s,../../etc/passwd,1,1,1,1,0,0,0\n",
        header + b"attic,train,s,/etc/passwd,1,1,1,1,0,0,0\n",
        header + b"attic,train,s,attic/seq-01/frame-000000.color.png,1,1,1,1e-320,0,0,0\n",
        header + b"attic,train,s,attic\0,1,1,1,1,0,0,0\n"]


def _run_well(command):
    outcome = _run(command)
    assert outcome == FINISHED, outcome


def _run(command):
    """Run a script within this process; returns what happened."""
    def hang(signum, frame):
        raise _Hangs

    output, errors, argv = io.StringIO(), io.StringIO(), sys.argv
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    sys.argv = list(command)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        return FINISHED
    except SystemExit as end:
        *others, last = errors.getvalue().splitlines() or [""]
        if end.code == 2 and last.startswith(f"{command[0]}: error: ") and not others:
            return CLEAR_LINE
        return f"exit status {end.code}: {errors.getvalue()}"
    except _Hangs:
        return "hangs"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        sys.argv = argv
