"""What ends a run early, or could: losses that are not finite, frames that change, signals, a closed screen."""
import os
import shlex
import signal
import subprocess
import sys

import torch
from conftest import ROOT, fails_here, run_here, same_weights, weights_of
from trainings import evaluation, locked, states, stop_in_third_epoch, training

from engine import resume
from util.losses import CameraPoseLoss


def test_a_loss_that_is_not_finite_ends_a_training_before_the_weights_change(attic, monkeypatch):
    stop_in_third_epoch(attic, "nan")
    forward, adam, steps, parameters = CameraPoseLoss.forward, torch.optim.Adam, [], []

    def nan_in_second_step(self, *poses):
        steps.append(1)
        return forward(self, *poses) * (float("nan") if len(steps) == 2 else 1)

    def noting_adam(trained, **kwargs):
        parameters.extend(trained)
        return adam(trained, **kwargs)

    monkeypatch.setattr(CameraPoseLoss, "forward", nan_in_second_step)
    monkeypatch.setattr(torch.optim, "Adam", noting_adam)
    before = states(attic / "nan")
    status, message = fails_here("main.py", *training(attic, "nan", "--resume", "latest", batch_size=6, average_last=0))
    assert status == 2 and "batch 1 of epoch 4: the loss is nan; frames: rows 2, 3, 4, 5, 6, 7 of " in message
    assert "it is saved up to epoch 3; resume it with: " in message and "smaller lr" in message
    state = torch.load(states(attic / "nan")[0])
    assert state["epoch"] == 3 and states(attic / "nan") != before
    saved = [value for key, value in state["weights"].items() if "running" not in key and "tracked" not in key]
    assert saved and all(torch.equal(value, now) for value, now in zip(saved, parameters))
    assert not list((attic / "nan").glob("*_final*"))


def test_the_frame_that_makes_a_loss_infinite_is_named(attic):
    labels = (attic / "train.csv").read_text().splitlines()
    cells = labels[4].split(",")
    labels[4] = ",".join([*cells[:4], "1e25", *cells[5:]])
    (attic / "far.csv").write_text("\n".join(labels) + "\n")
    status, message = fails_here("main.py", *training(attic, "far", labels="far.csv", batch_size=6))
    assert status == 2 and f"batch 1 of epoch 1: the loss is inf; frames: rows 5 of {attic / 'far.csv'}" in message


def test_a_frame_that_becomes_unreadable_during_a_training_is_named(attic, monkeypatch):
    whole = weights_of(run_here("main.py", *training(attic, "whole")))
    frame, write = attic / "attic/seq-train/frame-000003.color.png", resume.write
    content = frame.read_bytes()
    monkeypatch.setattr(resume, "write", lambda *args: (write(*args), frame.write_bytes(content[:3000])))
    for n_workers in (0, 1):
        frame.write_bytes(content)
        command = training(attic, f"unreadable-{n_workers}", cache_memory_gb=0, n_workers=n_workers)
        status, message = fails_here("main.py", *command)
        assert status == 2 and f"{attic / 'train.csv'}: row 5: image {frame} cannot be read" in message
    frame.write_bytes(content)
    monkeypatch.undo()
    output = run_here("main.py", *training(attic, "unreadable-0", "--resume", "latest"))
    assert "Resuming after epoch 1" in output and same_weights(whole, weights_of(output))


def test_a_run_outlives_its_screen(attic):
    command = [sys.executable, ROOT / "main.py", *evaluation(attic, "closed")]
    process = subprocess.run(f"{shlex.join(map(str, command))} | head -n 1", shell=True, capture_output=True, text=True)
    assert process.stdout == "Start posenet with test\n" and not process.stderr
    [log] = (attic / "closed").glob("*.log")
    assert "Recall at 5 m/10 deg" in log.read_text()


def test_an_interrupted_test_ends_in_one_line(attic, monkeypatch):
    monkeypatch.setattr("engine.evaluation.milliseconds", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    status, message = fails_here("main.py", *evaluation(attic, "tested"))
    assert status == 130 and message == "main.py: stopped by SIGINT"


def test_what_killed_processes_left_is_removed(attic):
    out = attic / "parts"
    out.mkdir()
    old, new, in_use = (out / f"run_01_01_20_00_00_final.pth.{name}.part" for name in ("0a", "0b", "0c"))
    for path in (old, new, in_use):
        path.write_bytes(b"part")
    for path in (old, in_use):
        os.utime(path, (1e9, 1e9))
    with locked(in_use):
        run_here("main.py", *training(attic, "parts", n_epochs=1))
    # A process may have just begun the new one.
    assert not old.exists() and new.exists() and in_use.exists()
