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
SHIFTS = {"utm": (552701.43614, 5180687.04621, 887.73053), "ecef": (4155123.4321, 672456.789, 4775321.123),
          "metres": (90.0, -40.0, 0.0)}
SETTINGS = ["--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=1", "batch_size=8", "average_last=0",
            "n_workers=0", "precision=fp32", "lr=1e-3", "eps=1e-6"]  # a larger eps: rounding is not amplified


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Label files of 40 training frames, of the first 16 and of 8 test frames, as they are and moved by each shift.

    They list few images, several times each.
    """
    root = tmp_path_factory.mktemp("origin")
    for split in ("train", "test"):
        write_scene(root, "attic", 5, split)
    random = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 8)):
        quaternions = random.standard_normal((n, 4))
        quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
        poses = np.hstack([random.standard_normal((n, 3)), quaternions])
        for name, shift in {"here": (0, 0, 0), **SHIFTS}.items():
            moved = np.hstack([poses[:, :3] + shift, poses[:, 3:]])
            rows = [f"attic,{split},s{i},attic/seq-{split}/frame-{i % 5:06d}.color.png," + ",".join(map(repr, pose))
                    for i, pose in enumerate(moved.tolist())]
            write_labels(root / f"{name}_{split}.csv", rows)
            if split == "train":
                write_labels(root / f"{name}_first.csv", rows[:16])
    return root


def train(layout, labels_file, script="main.py", weights=(), more=()):
    """Train on a label file; returns what was printed, and the weights."""
    output = run_here(script, "posenet", "train", "none", layout, layout / labels_file, ROOT / "config.json", *weights,
                      "--output_dir", layout / "out", *more, *SETTINGS)
    return output, weights_of(output)


def predict(layout, name, script="main.py", mode="test", weights=(), more=()):
    """Test or refine on one of the test label files; returns what was printed, and the predictions."""
    output = run_here(script, "posenet", mode, "none", layout, layout / f"{name}_test.csv", ROOT / "config.json",
                      *weights, "--output_dir", layout / "out", "--predictions_path", layout / "predicted.csv", *more,
                      *SETTINGS)
    return output, pd.read_csv(layout / "predicted.csv")


def train_and_test_all(layout, name, apr, refiner):
    """Train a PAE and a refiner on one of the label files, and test them, their APR and the solvers.

    refiner: the weights to test, in the place of the trained ones. Returns what each test printed, and its predictions.
    """
    tests = [predict(layout, name, weights=["--checkpoint_path", apr])]
    _, pae = train(layout, f"{name}_train.csv", "main_learn_pose_encoding.py", [apr])
    tests.append(predict(layout, name, "main_learn_pose_encoding.py", weights=[apr, "--encoder_checkpoint_path", pae]))
    train(layout, f"{name}_train.csv", "main_refine_apr.py", [apr, pae])
    tests.append(predict(layout, name, "main_refine_apr.py", weights=[apr, pae, "--rpr_checkpoint_path", refiner]))
    for solver in ("linear", "simplex"):
        references = ["--ref_poses_file", layout / f"{name}_train.csv", "--solver", solver]
        tests.append(predict(layout, name, "main_refine_apr.py", "optimize", [apr, pae], references))
    assert "know another place" not in "".join(output for output, _ in tests)
    run_here("main.py", "posenet", "predict", "none", layout / "attic/seq-test", "-", ROOT / "config.json",
             "--checkpoint_path", apr, "--predictions_path", layout / "poses.csv", "--output_dir", layout / "out",
             *SETTINGS)
    of_apr = tests[0][1]
    np.testing.assert_allclose(pd.read_csv(layout / "poses.csv")[POSITION], of_apr[POSITION].iloc[:5], atol=1e-5)
    return tests


def logged_numbers(output):
    """The numbers of a training's progress and validation lines."""
    lines = re.findall(r"^(?:\[Batch|Validation).*$", output, flags=re.MULTILINE)
    return [float(number) for line in lines for number in re.findall(r"[\d.]+", line.replace(",", ""))]


def test_a_shift_changes_no_result_of_training_testing_and_refining(layout, monkeypatch):
    torch.manual_seed(0)
    refiner = {key: torch.randn_like(value) if "reg" in key else value
               for key, value in PoseRefiner(16).state_dict().items()}
    torch.save(refiner, layout / "refiner.pth")
    logged, aprs = {}, {}
    for name in ("metres", "ecef"):
        validation = ["--val_labels_file", layout / f"{name}_test.csv"]
        output, aprs[name] = train(layout, f"{name}_first.csv", more=validation)
        assert ", positions far from the origin, around (" in output
        assert "\nPositions are taken relative to (" in output
        weights = torch.load(aprs[name])
        assert weights["origin"].dtype == torch.float64 and weights["x_reg.bias"].abs().max() < 10
        logged[name] = logged_numbers(output)
    assert len(logged["ecef"]) > 8 and logged["ecef"] == pytest.approx(logged["metres"], abs=0.011)

    # Small frames, which are faster; in a training of an APR they would amplify rounding.
    monkeypatch.setattr("datasets.transforms.SIZE", 64)
    tests = {name: train_and_test_all(layout, name, apr, layout / "refiner.pth") for name, apr in aprs.items()}
    for (_, table), (_, expected) in zip(tests["ecef"], tests["metres"], strict=True):
        # The labels themselves have nanometres at this distance; single precision would have half a metre.
        np.testing.assert_allclose(table[POSITION].to_numpy() - SHIFTS["ecef"],
                                   expected[POSITION].to_numpy() - SHIFTS["metres"], atol=1e-4)
        np.testing.assert_allclose(table["position_error_m"], expected["position_error_m"], atol=1e-4)
        np.testing.assert_allclose(table["orientation_error_deg"], expected["orientation_error_deg"], atol=1e-2)


@pytest.fixture(scope="module")
def apr_near_the_origin(layout):
    """The weights of a training on labels near the origin."""
    return train(layout, "here_first.csv")[1]


def test_weights_near_the_origin_keep_none(layout, apr_near_the_origin):
    assert "origin" not in torch.load(apr_near_the_origin)


def test_errors_far_from_the_origin_are_those_of_the_labels_digits(layout, apr_near_the_origin, monkeypatch):
    monkeypatch.setattr("datasets.transforms.SIZE", 64)
    weights = torch.load(apr_near_the_origin)
    _, expected = predict(layout, "here", weights=["--checkpoint_path", apr_near_the_origin])
    # The same weights, at another place.
    torch.save({**weights, "origin": torch.tensor(SHIFTS["ecef"], dtype=torch.double)}, layout / "moved.pth")
    output, table = predict(layout, "ecef", weights=["--checkpoint_path", layout / "moved.pth"])
    np.testing.assert_allclose(table["position_error_m"], expected["position_error_m"], atol=1e-6)
    assert "know another place" not in output
    # As the published code would have it: in a bias, whose resolution the log names.
    torch.save({**weights, "x_reg.bias": weights["x_reg.bias"] + torch.tensor(SHIFTS["ecef"])}, layout / "biased.pth")
    output, table = predict(layout, "ecef", weights=["--checkpoint_path", layout / "biased.pth"])
    truth = pd.read_csv(layout / "ecef_test.csv")[POSITION].to_numpy()
    errors = np.linalg.norm(table[POSITION].to_numpy() - truth, axis=1)
    np.testing.assert_allclose(table["position_error_m"], errors, atol=1e-6)
    warning = ("from the origin of these weights, which know another place, or keep no origin (here float32 has steps "
               "of 0.5)\n")
    assert f"{layout}/ecef_test.csv: the positions are about 6.37e+06 {warning}" in output


def test_a_training_that_begins_with_weights_keeps_their_origin(layout, apr_near_the_origin, monkeypatch):
    monkeypatch.setattr("datasets.transforms.SIZE", 64)
    weights = torch.load(apr_near_the_origin)
    origin = torch.tensor(SHIFTS["ecef"], dtype=torch.double)
    torch.save({**weights, "origin": origin}, layout / "with_origin.pth")
    output, apr = train(layout, "utm_first.csv", more=["--checkpoint_path", layout / "with_origin.pth"])
    assert torch.equal(torch.load(apr)["origin"], origin)
    assert f"{layout}/utm_first.csv: the positions are about 7." in output and "which know another place" in output
    _, apr = train(layout, "metres_first.csv", more=["--checkpoint_path", apr_near_the_origin])
    assert "origin" not in torch.load(apr)


def test_labels_far_from_the_origin_are_named_by_check(layout):
    status, output, _ = run_module_here(labels, "check", layout / "utm_test.csv", "--dataset_path", layout)
    assert "8 frames, image listed twice: 3, positions far from the origin, around (552701." in output
    assert "far from the origin" not in run_module_here(labels, "check", layout / "here_test.csv")[1]


def test_what_is_far_depends_on_the_scenes_extent_and_not_on_outliers():
    random = np.random.default_rng(0)
    room = random.uniform(-2, 2, (101, 3))
    for unit in (1e-3, 1, 1e3):  # a COLMAP model's is arbitrary
        assert far_origin(unit * (room + [3, 1, 0])) is None
        found = far_origin(unit * (room + [300, 1, 0]))
        assert np.allclose(found, unit * np.median(room + [300, 1, 0], axis=0))
    room[0] = 3e9  # as in GreatCourt
    assert far_origin(room) is None
    assert far_origin(np.ones((5, 3))) is None and far_origin(np.full((1, 3), 1e6)) is not None
