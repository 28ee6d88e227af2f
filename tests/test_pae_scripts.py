"""A PAE and a refiner of a single-scene APR, trained and tested by their scripts."""
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fails_here, run_here, weights_of, write_labels, write_scene

from models.posenet import PoseNet


@pytest.fixture(scope="module")
def layout(tmp_path_factory, small_frames):
    """A scene of six training and three test frames."""
    root = tmp_path_factory.mktemp("layout")
    write_labels(root / "train.csv", write_scene(root, "attic", 6, "train"))
    write_labels(root / "test.csv", write_scene(root, "attic", 3, "test"))
    return root


def arguments(layout, mode, labels, *weights):
    return ["posenet", mode, "none", layout, layout / labels, ROOT / "config.json", *weights, "--output_dir",
            layout / "out", "--set", "backbone_type=mobilenet", "hidden_dim=32", "n_epochs=2", "batch_size=4",
            "n_freq_checkpoint=1", "n_workers=0"]


@pytest.fixture(scope="module")
def apr(layout):
    """The weights of a trained APR."""
    return weights_of(run_here("main.py", *arguments(layout, "train", "train.csv")))


def train(layout, script, *weights):
    """Train until the loss is clearly smaller; returns the weights."""
    output = run_here(script, *arguments(layout, "train", "train.csv", *weights), "n_epochs=400",
                      "n_freq_checkpoint=1000", "learnable=false", "s_x=1", "s_q=1")
    losses = [float(loss) for loss in re.findall(r"running camera pose loss: (-?[\d.]+)", output)]
    assert losses[-1] < 0.7 * losses[0]
    return weights_of(output)


@pytest.fixture(scope="module")
def pae(layout, apr):
    """The weights of a trained PAE."""
    return train(layout, "main_learn_pose_encoding.py", apr)


@pytest.fixture(scope="module")
def refiner(layout, apr, pae):
    """The weights of a trained refiner."""
    return train(layout, "main_refine_apr.py", apr, pae)


def test_a_trained_pae_has_the_current_version(pae):
    assert torch.load(pae)._metadata[""]["version"] == 3


def test_too_few_training_frames_for_a_memory_are_told(layout, apr):
    output = run_here("main_learn_pose_encoding.py", *arguments(layout, "train", "train.csv", apr), "n_epochs=1")
    assert "Too few training frames, fewer than 32, in scene 0 (6)" in output
    output = run_here("main_refine_apr.py", *optimize(layout, apr, weights_of(output), more=["--fit_noise"]))
    assert "Too few training frames, fewer than 32, in scene 0 (6)" in output
    assert re.search(r"^Noise: of 6 frames of .*train.csv; memory: 0 of them", output, flags=re.MULTILINE)


def test_a_pae_and_a_refiner_are_refused_with_another_apr(layout, apr, pae, refiner):
    other = str(apr).replace("final", "checkpoint-1")  # of the same training
    for script, mode, weights, more, refused in (
            ("main_learn_pose_encoding.py", "test", [], ["--encoder_checkpoint_path", pae], pae),
            ("main_refine_apr.py", "test", [pae], ["--rpr_checkpoint_path", refiner], refiner),
            ("main_refine_apr.py", "optimize", [pae], ["--ref_poses_file", layout / "train.csv"], pae)):
        status, message = fails_here(script, *arguments(layout, mode, "test.csv", other, *weights, *more))
        assert status == 2 and message.endswith(
            f"{refused}: was trained on the latents of another APR than {other}; give that APR, or train anew on this "
            "one")


def test_a_refiners_test_compares_it_with_the_apr(layout, apr, pae, refiner):
    output = run_here("main_refine_apr.py", *arguments(layout, "test", "test.csv", apr, pae,
                                                       "--rpr_checkpoint_path", refiner))
    assert re.search(r"^The APR's own median: .*\n"
                     r"(Change of the median .*\(too few frames for an interval\)\n){2}"
                     r"Median pose error: ", output, flags=re.MULTILINE)


def optimize(layout, *weights, references="train.csv", more=()):
    """The arguments of a refinement at test time."""
    return arguments(layout, "optimize", "test.csv", *weights, "--predictions_path", layout / "optimized.csv",
                     "--ref_poses_file", layout / references, *more)


def test_the_papers_solver_weighs_the_positions_of_three_references(layout, apr, pae):
    output = run_here("main_refine_apr.py", *optimize(layout, apr, pae, more=["--solver", "mlp"]))
    positions = pd.read_csv(layout / "train.csv")[["t1", "t2", "t3"]].to_numpy()
    table = pd.read_csv(layout / "optimized.csv")
    for position in table[["t1", "t2", "t3"]].to_numpy():
        assert any(is_inside(position, positions[list(three)]) for three in itertools.combinations(range(6), 3))
    orientations = (table[[f"{prefix}q{i}" for i in range(1, 5)]] for prefix in ("apr_", ""))
    assert np.allclose(*orientations, atol=1e-6)
    assert "held the answers" not in output
    assert re.search(r"^Refinement: \d+\.\d+ ms a query, \d+\.\d% of the APR's time$", output, flags=re.MULTILINE)


def is_inside(point, corners):
    """Whether a point is in a triangle."""
    (a, b), *_ = np.linalg.lstsq((corners[1:] - corners[0]).T, point - corners[0])
    in_plane = corners[0] + a * (corners[1] - corners[0]) + b * (corners[2] - corners[0])
    return np.allclose(in_plane, point, atol=1e-4) and min(a, b, 1 - a - b) > -1e-4


def test_a_pae_without_the_covariance_of_latents_has_only_the_papers_solvers(layout, apr, pae):
    weights = torch.load(pae)
    published = layout / "published_pae.pth"
    torch.save({**weights, "noise": torch.zeros_like(weights["noise"])}, published)
    output = run_here("main_refine_apr.py", *optimize(layout, apr, published))
    assert f"refined by {published} (mlp) on " in output  # the default of published PAEs
    listed = optimize(layout, apr, published, more=["--solver", "inversion"])
    status, message = fails_here("main_refine_apr.py", *listed)
    assert status == 2 and "does not hold the covariance of latents that inversion works with" in message
    assert "choose --solver mlp or simplex" in message


def test_every_line_of_a_result_says_that_the_references_held_the_answers(layout, apr, pae):
    output = run_here("main_refine_apr.py", *optimize(layout, apr, pae, references="test.csv", more=[
        "--solver", "simplex", "--allow_query_poses"]))
    results = [line for line in output.splitlines()
               if line.startswith(("Median", "Mean pose", "90th", "Recall", "Change"))]
    assert len(results) == 10 and all(line.endswith(" (the references held the answers)") for line in results)


def test_the_teacher_runs_once_over_the_frames_whatever_the_paes_input(layout, apr, monkeypatch):
    batches, forward, paes = [], PoseNet.forward, {}
    monkeypatch.setattr(PoseNet, "forward", lambda self, data: batches.append(len(data["img"])) or forward(self, data))
    for pae_input in ("estimated", "true"):
        batches.clear()
        output = run_here("main_learn_pose_encoding.py", *arguments(layout, "train", "train.csv", apr), "n_epochs=5",
                          f"pae_input={pae_input}")
        assert sum(batches) == 6
        paes[pae_input] = torch.load(weights_of(output))
    # At the start both are the same network; what they were given to encode is not.
    assert not torch.equal(paes["estimated"]["x_encoder.0.weight"], paes["true"]["x_encoder.0.weight"])
