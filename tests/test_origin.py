"""Positions far from the origin (UTM, earth-centred): a constant that is added to all of them changes no result."""
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_here, run_module_here, weights_of, write_labels, write_scene

from datasets import labels
from datasets.labels import far_origin
from models.pose_refiner import PoseRefiner

POSITION = ["t1", "t2", "t3"]
SHIFTS = {"utm": (552701.43614, 5180687.04621, 887.73053), "ecef": (4155123.4321, 672456.789, 4775321.123), "metres": (90.0, -40.0, 0.0)}
SETTINGS = ["--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=1", "batch_size=8", "average_last=0", "n_workers=0", "precision=fp32", "lr=1e-3",
            "eps=1e-6"]  # larger: rounding is not amplified


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Label files of 40 and of 8 frames of few images, as they are and moved by each shift."""
    root = tmp_path_factory.mktemp("origin")
    for split in ("train", "test"):
        write_scene(root, "attic", 5, split)
    random = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 8)):
        quaternions = random.standard_normal((n, 4))
        poses = np.hstack([random.standard_normal((n, 3)), quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)])
        for name, shift in {"here": (0, 0, 0), **SHIFTS}.items():
            rows = [f"attic,{split},s{i},attic/seq-{split}/frame-{i % 5:06d}.color.png,"
                    + ",".join(map(repr, [*(float(x) for x in pose[:3] + shift), *map(float, pose[3:])])) for i, pose in enumerate(poses)]
            write_labels(root / f"{name}_{split}.csv", rows)
    return root


def run(layout, name, script="main.py", mode="test", weights=(), more=()):
    """Run a script on one of the label files; returns what it printed and, in tests, its predictions."""
    split = "train" if mode == "train" else "test"
    predictions = [] if mode == "train" else ["--predictions_path", layout / "predicted.csv"]
    output = run_here(script, "posenet", mode, "none", layout, layout / f"{name}_{split}.csv", ROOT / "config.json", *weights,
                      "--output_dir", layout / "out", *predictions, *more, *SETTINGS)
    return output, None if mode == "train" else pd.read_csv(layout / "predicted.csv")


def test_a_shift_changes_no_result_of_training_testing_and_refining(layout):
    torch.manual_seed(0)
    refiner, results = layout / "refiner.pth", {}
    torch.save({key: torch.randn_like(value) if "reg" in key else value for key, value in PoseRefiner(16).state_dict().items()}, refiner)
    for name in ("metres", "ecef"):
        printed, _ = run(layout, name, mode="train", more=["--val_labels_file", layout / f"{name}_test.csv"])
        apr = weights_of(printed)
        tested = run(layout, name, weights=["--checkpoint_path", apr])
        pae = weights_of(run(layout, name, "main_learn_pose_encoding.py", "train", [apr])[0])
        encoded = run(layout, name, "main_learn_pose_encoding.py", weights=[apr, "--encoder_checkpoint_path", pae])
        weights_of(run(layout, name, "main_refine_apr.py", "train", [apr, pae])[0])
        refined = run(layout, name, "main_refine_apr.py", weights=[apr, pae, "--rpr_checkpoint_path", refiner])
        solved = [run(layout, name, "main_refine_apr.py", "optimize", [apr, pae], ["--ref_poses_file", layout / f"{name}_train.csv", "--solver", solver])
                  for solver in ("linear", "simplex")]
        results[name] = [printed, tested, encoded, refined, *solved]
        weights = torch.load(apr)
        assert weights["origin"].dtype == torch.float64 and weights["x_reg.bias"].abs().max() < 10
        assert ", positions far from the origin, around (" in printed and "\nPositions are taken relative to (" in printed
        assert "know another place" not in "".join(output for output, _ in results[name][1:])
        listed = ["main.py", "posenet", "predict", "none", layout / "attic/seq-test", "-", ROOT / "config.json", "--checkpoint_path", apr,
                  "--predictions_path", layout / "poses.csv", "--output_dir", layout / "out", *SETTINGS]
        run_here(*listed)
        np.testing.assert_allclose(pd.read_csv(layout / "poses.csv")[POSITION], tested[1][POSITION].iloc[:5], atol=1e-5)

    logged = [[float(number) for line in re.findall(r"^(?:\[Batch|Validation).*$", results[name][0], flags=re.MULTILINE)
               for number in re.findall(r"[\d.]+", line.replace(",", ""))] for name in ("ecef", "metres")]
    assert len(logged[0]) > 8 and logged[0] == pytest.approx(logged[1], abs=0.011)
    for (_, table), (_, expected) in zip(results["ecef"][1:], results["metres"][1:], strict=True):
        # The labels themselves have nanometres at this distance; single precision would have half a metre.
        np.testing.assert_allclose(table[POSITION].to_numpy() - SHIFTS["ecef"], expected[POSITION].to_numpy() - SHIFTS["metres"], atol=1e-4)
        np.testing.assert_allclose(table["position_error_m"], expected["position_error_m"], atol=1e-4)
        np.testing.assert_allclose(table["orientation_error_deg"], expected["orientation_error_deg"], atol=1e-2)


def test_weights_near_the_origin_have_none_and_errors_are_those_of_the_labels_digits(layout):
    apr = weights_of(run(layout, "here", mode="train")[0])
    weights = torch.load(apr)
    assert "origin" not in weights
    _, expected = run(layout, "here", weights=["--checkpoint_path", apr])
    # The same weights, at another place.
    torch.save({**weights, "origin": torch.tensor(SHIFTS["ecef"], dtype=torch.double)}, layout / "moved.pth")
    output, table = run(layout, "ecef", weights=["--checkpoint_path", layout / "moved.pth"])
    np.testing.assert_allclose(table["position_error_m"], expected["position_error_m"], atol=1e-6)
    assert "know another place" not in output
    # As the published code would have it: in a bias, whose steps the log tells.
    torch.save({**weights, "x_reg.bias": weights["x_reg.bias"] + torch.tensor(SHIFTS["ecef"])}, layout / "biased.pth")
    output, table = run(layout, "ecef", weights=["--checkpoint_path", layout / "biased.pth"])
    errors = np.linalg.norm(table[POSITION].to_numpy() - pd.read_csv(layout / "ecef_test.csv")[POSITION].to_numpy(), axis=1)
    np.testing.assert_allclose(table["position_error_m"], errors, atol=1e-6)
    said = "from the origin of these weights, which know another place, or keep no origin (here float32 has steps of 0.5)\n"
    assert f"{layout}/ecef_test.csv: the positions are about 6.37e+06 {said}" in output
    # A training that begins with weights takes their origin, or none.
    output, _ = run(layout, "utm", mode="train", more=["--checkpoint_path", layout / "moved.pth"])
    assert torch.equal(torch.load(weights_of(output))["origin"], torch.tensor(SHIFTS["ecef"], dtype=torch.double))
    assert f"{layout}/utm_train.csv: the positions are about 7." in output and "which know another place" in output
    output, _ = run(layout, "metres", mode="train", more=["--checkpoint_path", apr])
    assert "origin" not in torch.load(weights_of(output))


def test_labels_far_from_the_origin_are_named_by_check(layout):
    status, output, _ = run_module_here(labels, "check", layout / "utm_test.csv", "--dataset_path", layout)
    assert "8 frames, image listed twice: 3, positions far from the origin, around (552701." in output
    assert "far from the origin" not in run_module_here(labels, "check", layout / "here_test.csv")[1]


def test_far_is_told_by_the_scenes_extent_and_not_by_outliers():
    random = np.random.default_rng(0)
    room = random.uniform(-2, 2, (101, 3))
    for unit in (1e-3, 1, 1e3):  # a COLMAP model's is any
        assert far_origin(unit * (room + [3, 1, 0])) is None
        found = far_origin(unit * (room + [300, 1, 0]))
        assert np.allclose(found, unit * np.median(room + [300, 1, 0], axis=0))
    room[0] = 3e9  # as in GreatCourt
    assert far_origin(room) is None
    assert far_origin(np.ones((5, 3))) is None and far_origin(np.full((1, 3), 1e6)) is not None
