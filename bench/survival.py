"""What a training survives: kills, damaged files, and many steps.

    python -m bench.survival kills       # SIGKILL and SIGTERM at random moments, resuming each time: the same weights
    python -m bench.survival damage      # damaged files: every run finishes or ends in a clear line
    python -m bench.survival steps       # 10,000 steps: memory and open files stay what they were
"""
import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import damage
from bench.common import FRAMES, frames
from util.files import whole_file

SETTINGS = ["backbone_type=mobilenet", "hidden_dim=32", "batch_size=8", "n_freq_print=1000"]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.survival", description="What a training survives.")
    parser.add_argument("what", choices=("kills", "damage", "steps"))
    parser.add_argument("--n", type=int, help="kills of each kind, damaged files, steps (default: 20, 300, 10000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--folder", metavar="DIR", default="out/bench/survival", help="emptied first (default: out/bench/survival)")
    args = parser.parse_args()
    folder = Path(args.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if args.what == "kills":
        result = kills(folder, FRAMES, frames(16, 320, 240), args.n or 20, 60, args.seed)
    elif args.what == "steps":
        result = steps(folder, args.n or 10000)
    else:
        result = damage.run_all(folder, args.n or 300, args.seed)
    with whole_file(f"{folder}.{args.what}.json") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1))


def kills(folder, dataset, labels, n, n_epochs, seed):
    """Train without interruption, then with n ends by SIGKILL and with n by SIGTERM, the weights of each compared with the
    first's. Of the ends by SIGKILL every other is while a file is being written. Returns what happened, a dict a kind;
    raises AssertionError for other weights or an end that is none."""
    training = [sys.executable, "main.py", "posenet", "train", "none", str(dataset), str(labels), "config.json", "--set", *SETTINGS,
                f"n_epochs={n_epochs}", "n_workers=1", "--output_dir"]
    begin = time.monotonic()
    subprocess.run([*training, folder / "whole"], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begin
    expected = _weights(folder / "whole")
    results = {}
    for kind in (signal.SIGKILL, signal.SIGTERM):
        rng = random.Random(seed)
        out = folder / kind.name
        out.mkdir()
        command, ends, lives = [*training, out], [], 0
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            lives += 1
            if len(ends) < n:
                in_save = kind == signal.SIGKILL and len(ends) % 2 == 0
                # Most live long enough to save an epoch or two (a process starts for six seconds), and none to the end.
                ended = _end(process, kind, out, in_save, rng.uniform(2, 6 + max(seconds - 6, 0) / n))
                if ended:
                    ends.append(ended)
            stderr = process.communicate()[1]
            finished = any(out.glob("*_final.pth")) and not any(out.glob("*_resume-*.pth"))
            if process.returncode == 0 or finished:
                break
            assert process.returncode in (-kind, 128 + kind), stderr
            command = _next(command, training, out, stderr if process.returncode == 143 else "")
        weights = _weights(out)
        assert all(torch.equal(expected[key], weights[key]) for key in expected), "other weights"
        run = next(out.glob("*_final.pth")).name.removesuffix("_final.pth")
        left = [path.name for path in out.glob(f"{run}_*") if path.suffix == ".part" or "_resume-" in path.name]
        assert not left, left
        results[kind.name] = {"ends": len(ends), "while writing": ends.count("writing"), "processes": lives, "weights": "equal, bit for bit"}
    return results


def _end(process, kind, out, in_save, after):
    """Send a signal to a process after so many seconds, or as soon as it writes a file; returns when that was, or None if
    the process was done before."""
    deadline = time.monotonic() + (60 if in_save else after)
    before = set(out.glob("*.part"))  # of a training that was killed before it had saved an epoch
    while process.poll() is None and time.monotonic() < deadline:
        if in_save and set(out.glob("*.part")) - before:
            process.send_signal(kind)
            return "writing"
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(kind)
        return "anywhere"


def _next(command, training, out, stderr):
    """The command that goes on: what the process said, or after a kill, --resume latest if anything is saved."""
    if not stderr:
        return [*training, out, *(["--resume", "latest"] if any(out.glob("*_resume-*.pth")) else [])]
    last = stderr.rstrip().splitlines()[-1]
    assert last.startswith("main.py: stopped by SIGTERM"), stderr
    told = re.search("go on with: python (.*)", last)
    assert told or "start it again" in last or "; " not in last, last
    return [sys.executable, *shlex.split(told[1])] if told else command


def _weights(out):
    [path] = out.glob("*_final.pth")
    return torch.load(path)


def steps(folder, n):
    """Train PoseNet and a PAE for n steps; returns resident memory and open files after a tenth of them and at the end."""
    dataset, labels = FRAMES, frames(n // 10, 320, 240)
    common = ["posenet", "train", "none", dataset, labels, "config.json"]
    settings = ["--output_dir", str(folder), "--set", *SETTINGS, "batch_size=1", "n_epochs=10", "n_workers=0", "n_freq_checkpoint=1000",
                "average_last=0"]
    apr, result = f"{folder}/apr.pth", {}
    for script, more in (("main.py", []), ("main_learn_pose_encoding.py", [apr])):
        process = subprocess.Popen([sys.executable, script, *common, *more, *settings], stdout=subprocess.PIPE, text=True)
        seen, last = [], ""
        for line in process.stdout:
            if line.startswith("[Batch-1/Epoch-") or line.startswith("Training completed"):
                seen.append(_resources(process.pid))
            last = line
        assert process.wait() == 0 and len(seen) == 11
        if script == "main.py":
            os.rename(last.strip().removeprefix("Weights: "), apr)
        (megabytes, files), (end_megabytes, end_files) = seen[1], seen[-1]
        result[script] = {"steps": n, f"MB after {n // 10}": megabytes, "MB at the end": end_megabytes,
                          "change": f"{100 * (end_megabytes / megabytes - 1):+.2f}%", f"files after {n // 10}": files, "files at the end": end_files}
    return result


def _resources(pid):
    """A process's resident memory in MB, and its number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


if __name__ == "__main__":
    main()
