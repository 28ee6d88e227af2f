"""What trainings survive: kills, many steps, damaged files. These tests take long; `make soak` runs them.

The environment sets their counts: SOAK_KILLS of each signal, SOAK_STEPS, SOAK_DAMAGE (files), and SOAK_SEED.
"""
import json
import os
import signal

import pytest
from conftest import write_labels, write_scene
from soak import damage, kills, steps

KILLS = int(os.environ.get("SOAK_KILLS", 20))
STEPS = int(os.environ.get("SOAK_STEPS", 10000))
DAMAGE = int(os.environ.get("SOAK_DAMAGE", 300))
SEED = int(os.environ.get("SOAK_SEED", 0))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with labels.csv, 16 frames, and `whole`, the output folder of a training; and the training's seconds."""
    root = tmp_path_factory.mktemp("kills")
    write_labels(root / "labels.csv", write_scene(root, "attic", 16, "train"))
    return root, kills.run_uninterrupted(kills.training(root, root / "labels.csv", root / "whole"))


@pytest.mark.parametrize("signum", (signal.SIGKILL, signal.SIGTERM), ids=lambda signum: signum.name)
def test_a_training_that_is_killed_and_resumed_ends_with_the_same_weights(uninterrupted, signum):
    root, seconds = uninterrupted
    out = root / signum.name
    result = kills.run_with_kills(kills.training(root, root / "labels.csv", out), out, signum, KILLS, seconds, SEED)
    print(json.dumps({signum.name: result}, indent=1))
    assert result["ends"] > 0
    assert kills.equal_weights(root / "whole", out)


def test_memory_and_open_files_do_not_grow_with_the_steps(tmp_path):
    labels = write_labels(tmp_path / "labels.csv", write_scene(tmp_path, "attic", STEPS // steps.N_EPOCHS, "train"))
    apr = []
    for script in ("main.py", "main_learn_pose_encoding.py"):
        resources, weights = steps.run(script, tmp_path, labels, tmp_path / script, apr)
        (megabytes, files), (end_megabytes, end_files) = resources[1], resources[-1]
        print(json.dumps({script: {
            "steps": STEPS, "MB after a tenth": megabytes, "MB at the end": end_megabytes,
            "change": f"{100 * (end_megabytes / megabytes - 1):+.2f}%",
            "files after a tenth": files, "files at the end": end_files}}, indent=1))
        assert end_files == files
        assert end_megabytes < 1.05 * megabytes
        apr = [weights]


def test_a_damaged_file_ends_in_a_clear_line_or_does_no_harm(tmp_path):
    print(json.dumps(damage.run_all(tmp_path, DAMAGE, SEED), indent=1))
