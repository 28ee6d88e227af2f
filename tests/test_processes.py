"""Several processes train as one does, and test every frame once."""
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_here, weights_of, write_labels, write_scene
from torch import nn

from datasets import loaders, transforms
from datasets.camera_poses import CameraPoseDataset
from engine import resume
from models.posenet import PoseNet
from util import processes

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SETTINGS = ["--set", "backbone_type=efficientnet", "hidden_dim=16", "batch_size=5", "n_workers=0", "n_epochs=100",
            "precision=fp32", "no_augment=true", "lr=1e-4", "learnable=true", "s_x=0", "s_q=0", "average_last=0"]

pytestmark = pytest.mark.usefixtures("small_frames")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_labels(root / "train.csv", write_scene(root, "attic", 15, "train"))
    write_labels(root / "test.csv", write_scene(root, "attic", 5, "test"))
    return root


def arguments(layout, mode, out, *more, labels="train.csv", **settings):
    return ["posenet", mode, "none", layout, layout / labels, ROOT / "config.json", *more, "--output_dir", layout / out,
            *SETTINGS, *(f"{key}={value}" for key, value in settings.items())]


def test_two_processes_take_the_steps_of_one_and_one_resumes_their_training(layout, monkeypatch):
    with monkeypatch.context() as patch:
        # PoseNet computes the same in training as in testing, as bench.steady --frozen_norms lets it.
        patch.setattr(PoseNet, "train", lambda self, mode=True: nn.Module.train(self, False))
        patch.setattr(resume, "remove", lambda prefix: None)
        run_here("main.py", *arguments(layout, "train", "one", n_epochs=4))
    one = torch.load(states(layout / "one")[4])
    two = state_when_killed(layout / "two", 4, *TORCHRUN, "-m", "bench.steady", "--frozen_norms", "--size=64",
                            "main.py", *arguments(layout, "train", "two"))
    losses, losses_two = (state["losses"][:10] for state in (one, two))
    assert torch.allclose(losses, losses_two, rtol=0, atol=1e-5) and len(set(losses.tolist())) == 10
    # Three batches of five frames per epoch, of which the processes have nine and six; errors are medians over all.
    curves, curves_two = (torch.tensor(state["curves"][:3]) for state in (one, two))
    assert curves[:, 0].tolist() == [3, 6, 9]
    assert torch.allclose(curves[:, 2], losses[:9].view(3, 3).mean(dim=1).float())
    assert torch.allclose(curves, curves_two, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert two["optimizer"].keys() == one["optimizer"].keys()

    saved = max(states(layout / "two"))
    output = run_here("main.py", *arguments(layout, "train", "two", "--resume", "latest", n_epochs=saved + 1))
    assert f"Resuming after epoch {saved}" in output and f"/Epoch-{saved + 1}]" in output
    assert weights_of(output).is_file()


def states(folder):
    """The state files of the training in a folder: {epoch: path}."""
    return {int(re.search(r"-(\d+)\.pth", path.name)[1]): path for path in folder.glob("*_resume-*.pth")}


def state_when_killed(folder, epoch, *command):
    """Run a training until it has saved an epoch, kill it and all that it started, and return its newest state."""
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 600
        while max(states(folder), default=0) < epoch:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.01)
    finally:
        for listed in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's processes outlive it
            with contextlib.suppress(OSError):
                if str(folder).encode() in listed.read_bytes():
                    os.kill(int(listed.parent.name), signal.SIGKILL)
        process.communicate()
    found = states(folder)
    return torch.load(found[max(found)])


@pytest.fixture
def run_in_two(tmp_path):
    """A function that runs a script in two processes, as torchrun would start them; returns what rank 0 printed.

    They are forked from a process that has imported PyTorch, which saves the time of torchrun's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "models.backbones", "datasets.transforms"])

    def run(*command):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=run_rank, args=(rank, port, tmp_path / "output", command)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        try:
            connection.wait([rank.sentinel for rank in ranks])
            for rank in ranks:
                rank.join(600 if all(not other.exitcode for other in ranks) else 1)
            assert [rank.exitcode for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
        return (tmp_path / "output").read_text()

    return run


def run_rank(rank, port, output_file, command):
    """Run a script as one rank of two; rank 0 writes what it printed to a file. The other ends by sys.exit()."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"})
    transforms.SIZE = 64  # as small_frames does
    output = run_here(*command)
    assert rank == 0
    output_file.write_text(output)


def test_two_processes_test_every_frame_once_and_teach_the_same_pae(layout, run_in_two):
    apr = weights_of(run_here("main.py", *arguments(layout, "train", "apr", n_epochs=1)))
    tables, paes = [], []
    for name, run in (("one", run_here), ("two", run_in_two)):
        predictions = layout / f"{name}.csv"
        output = run("main.py", *arguments(
            layout, "test", "tested", "--checkpoint_path", apr, "--predictions_path", predictions, "--cache_dir",
            layout / f"cache-{name}", "--verbose", labels="test.csv"))
        assert len(re.findall("^Median pose error: ", output, flags=re.MULTILINE)) == 1
        assert len(re.findall("^Pose error: ", output, flags=re.MULTILINE)) == 5
        tables.append(pd.read_csv(predictions))
        output = run("main_learn_pose_encoding.py", *arguments(layout, "train", "pae", apr, n_epochs=3))
        paes.append(torch.load(weights_of(output)))
    assert tables[0]["img_path"].equals(tables[1]["img_path"])
    assert np.allclose(tables[0].loc[:, "t1":], tables[1].loc[:, "t1":], atol=1e-4)
    assert all(torch.allclose(value, paes[1][key], atol=1e-5) for key, value in paes[0].items())


@pytest.mark.parametrize("n_processes, batch_size", [(2, 4), (3, 5), (3, 3)])
def test_shards_make_up_the_batches_of_one_process(layout, monkeypatch, n_processes, batch_size):
    rows = (layout / "train.csv").read_text().splitlines()[:9]
    in_cellar = [row.replace("attic,", "cellar,", 1) for row in rows[1:4]]
    (layout / "two.csv").write_text("\n".join([*rows, *in_cellar]) + "\n")
    dataset = CameraPoseDataset(layout, layout / "two.csv", equalize_scenes=True)
    assert len(dataset) == 16  # eight of each scene

    def epoch(rank, world_size, number):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "world_size", lambda: world_size)
        return [batch["row"].tolist() for batch in loaders.train_batches(dataset, batch_size, 0, seed=3)(number)]

    for number in (0, 1):
        whole = epoch(0, 1, number)
        shards = [epoch(rank, n_processes, number) for rank in range(n_processes)]
        assert len({len(shard) for shard in shards}) == 1
        for batch, *parts in zip(whole, *shards, strict=True):
            together = [row for part in parts for row in part]
            if len(batch) >= n_processes:
                assert sorted(together) == sorted(batch)
            else:  # one frame for each process
                assert set(together) == set(batch) and len(together) == n_processes
    assert epoch(0, n_processes, 0) != epoch(0, n_processes, 1)
    tested = []
    for rank in range(n_processes):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        tested += [row for batch in loaders.test_batches(dataset, 2, 0) for row in batch["row"].tolist()]
    assert len(tested) == len(dataset)
