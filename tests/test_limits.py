"""A full disk and limits on open files: a run ends in one line, or takes fewer files, and spoils nothing."""
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import fails_here, run_here, weights_of
from trainings import evaluation, stop_in_third_epoch, training

from engine.run import Run
from engine.tensorboard import curve_writer
from util import cli
from util.config import Config
from util.errors import UserError


@pytest.fixture
def limit_file_size():
    """A function that limits the size of files, as a full disk does; None, or the test's end, removes the limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if n_bytes is None else n_bytes, limits[1]))
    yield set_limit
    set_limit(None)


def repeat_labels(attic, name, n):
    """Write a label file that lists the training frames n times."""
    header, rows = (attic / "train.csv").read_text().split("\n", 1)
    (attic / name).write_text(f"{header}\n{rows * n}")


def test_a_full_disk_ends_a_run_in_one_line_and_spoils_nothing(attic, limit_file_size):
    def contents():
        return {path: path.read_bytes() for path in attic.rglob("*") if path.is_file() and path.suffix != ".log"}

    def message_when_full(limit, *command):
        files = contents()
        limit_file_size(limit)
        status, message = fails_here("main.py", *command)
        limit_file_size(None)
        assert status == 2 and message.endswith("cannot be written: File too large")
        assert contents() == files
        return message

    stop_in_third_epoch(attic, "stopped")
    resumed = training(attic, "stopped", "--resume", "latest")
    assert "_resume-3.pth: " in message_when_full(2 ** 20, *resumed)  # a state
    cached = training(attic, "cached", "--cache_dir", attic / "cache", n_epochs=1)
    run_here("main.py", *cached)
    os.utime(attic / "attic/seq-train/frame-000000.color.png")
    assert f"{attic / 'cache'}/" in message_when_full(2 ** 18, *cached)  # a cache
    predictions = attic / "p.csv"
    run_here("main.py", *evaluation(attic, "tested", "--predictions_path", predictions))
    repeat_labels(attic, "many.csv", 20)
    tested = evaluation(attic, "tested", "--predictions_path", predictions, labels="many.csv")
    assert f"{predictions}: " in message_when_full(15_000, *tested)  # predictions, longer than the log
    assert f"{attic / 'tested'}/run_" in message_when_full(2 ** 13, *tested)  # the log
    output = run_here("main.py", *resumed)  # there is room again
    assert "Resuming after epoch" in output and weights_of(output).is_file()


def test_tensorboard_without_room_ends_in_one_line(tmp_path, limit_file_size, capfd):
    run = Run(Config(), torch.device("cpu"), prefix=str(tmp_path / "run"), tensorboard=True)
    for limit, reason in ((2000, "File too large"), (None, "File exists")):
        error = f"run_tensorboard: cannot be written: {reason}"
        state = SimpleNamespace(run=run, curves=[], losses=[])
        with pytest.raises(UserError, match=error), curve_writer(state) as write:
            limit_file_size(limit)
            state.curves, state.losses = [[500, 1e-3, 0.5, 0.1, 1.0, 0.1, 1.0]], [0.5] * 500
            write()
        limit_file_size(None)
        assert not capfd.readouterr().err
        shutil.rmtree(tmp_path / "run_tensorboard", ignore_errors=True)
        (tmp_path / "run_tensorboard").touch()


@pytest.fixture
def limit_open_files():
    """A function that allows this many open files more than there are now, until the test's end."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + n, limits[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_many_batches_of_workers_need_few_open_files(attic, limit_open_files):
    repeat_labels(attic, "long.csv", 8)
    for script in ("main.py", "main_learn_pose_encoding.py"):  # the teacher's pass keeps the pose of every frame
        command = training(attic, "long", script=script, labels="long.csv", n_workers=1, batch_size=1,
                           test_batch_size=1, n_epochs=1, average_last=0)
        limit_open_files(40)  # a batch has four tensors, each of them a file
        weights_of(run_here(script, *command))


def test_workers_leave_open_files_to_the_rest_of_the_run(attic, limit_open_files):
    limit_open_files(15)  # fewer than a worker takes
    output = run_here("main.py", *evaluation(attic, "few", n_workers=1))
    assert "\nMedian pose error: " in output


def test_too_many_open_files_are_one_line(limit_open_files, capsys):
    opened = []
    limit_open_files(5)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(lambda: opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(10)))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: too many open files for a process here: allow more (ulimit -n 1024), or take fewer workers "
        "(--set n_workers=0)\n")
