"""Trainings that SIGKILL or SIGTERM ends at random moments, and that are resumed each time."""
import random
import re
import shlex
import signal
import subprocess
import sys
import time

from conftest import ROOT, same_weights

SETTINGS = ["backbone_type=mobilenet", "hidden_dim=32", "batch_size=8", "n_epochs=60", "n_workers=1",
            "n_freq_print=1000"]
SECONDS_TO_START = 6  # of a process, about, until its first step


def training(dataset, labels, out):
    """The command of a training of 60 epochs, which writes to the folder `out`."""
    return [sys.executable, ROOT / "main.py", "posenet", "train", "none", dataset, labels, ROOT / "config.json",
            "--output_dir", out, "--set", *SETTINGS]


def run_uninterrupted(command):
    """Run a training to its end; returns the seconds that it took."""
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def run_with_kills(command, out, signum, n, seconds, seed):
    """Run a training that n signals end, resumed after each. Every other SIGKILL comes while a file is being written.

    command: of `training`, with the output folder `out`. seconds: how long it takes uninterrupted.
    Returns {"ends", "while writing", "processes"}, the number of each. Raises AssertionError where a process ends in
    another way, or the training leaves files behind.
    """
    rng = random.Random(seed)
    out.mkdir()
    next_command, ends, n_processes = command, [], 0
    while True:
        process = subprocess.Popen(next_command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        n_processes += 1
        if len(ends) < n:
            while_writing = signum == signal.SIGKILL and len(ends) % 2 == 0
            # Most processes live long enough to save an epoch or two, and none to the end.
            seconds_to_live = rng.uniform(2, SECONDS_TO_START + max(seconds - SECONDS_TO_START, 0) / (n + 1))
            end = _send(process, signum, out, while_writing, seconds_to_live)
            if end:
                ends.append(end)
        stderr = process.communicate()[1]
        finished = any(out.glob("*_final.pth")) and not any(out.glob("*_resume-*.pth"))
        if process.returncode == 0 or finished:
            break
        assert process.returncode in (-signum, 128 + signum), stderr
        next_command = _resuming(next_command, command, out, stderr if process.returncode == 143 else "")
    _check_files(out)
    return {"ends": len(ends), "while writing": ends.count("writing"), "processes": n_processes}


def equal_weights(first, second):
    """Whether the final weights in two output folders are equal, bit for bit."""
    [first], [second] = first.glob("*_final.pth"), second.glob("*_final.pth")
    return same_weights(first, second)


def _send(process, signum, out, while_writing, seconds_to_live):
    """Send a signal to a process after this many seconds, or as soon as it writes a file.

    Returns "writing" or "anywhere", or None if the process ended before.
    """
    deadline = time.monotonic() + (60 if while_writing else seconds_to_live)
    before = set(out.glob("*.part"))  # of a process that was killed before it had saved an epoch
    while process.poll() is None and time.monotonic() < deadline:
        if while_writing and set(out.glob("*.part")) - before:
            process.send_signal(signum)
            return "writing"
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(signum)
        return "anywhere"
    return None


def _resuming(last_command, command, out, stderr):
    """The command that resumes: as the process advised, or --resume latest where it had no time to say so."""
    if not stderr:
        return [*command, *(["--resume", "latest"] if any(out.glob("*_resume-*.pth")) else [])]
    last = stderr.rstrip().splitlines()[-1]
    assert last.startswith("main.py: stopped by SIGTERM"), stderr
    advised = re.search("resume it with: python (.*)", last)
    assert advised or "start it again" in last or "; " not in last, last
    return [sys.executable, *shlex.split(advised[1])] if advised else last_command


def _check_files(out):
    """Raise AssertionError where a finished training has left partial files or states."""
    run = next(out.glob("*_final.pth")).name.removesuffix("_final.pth")
    left = [path.name for path in out.glob(f"{run}_*") if path.suffix == ".part" or "_resume-" in path.name]
    assert not left, left
