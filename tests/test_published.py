"""The published transform, and the published checkpoints on the real frames, frame by frame."""
import re

import numpy as np
import pandas as pd
import pytest
from conftest import MINI, PUBLISHED, ROOT, needs_real_frames, run_here, weights_of

from datasets.camera_poses import CameraPoseDataset
from datasets.labels import read_labels
from datasets.transforms import to_input

pytestmark = needs_real_frames
APR = PUBLISHED / "posenet_mobilenet_apr.pth"
PAE = PUBLISHED / "posenet_mobilenet_pose_encoder.pth"


def mini_labels(split):
    """A label file's text. The frames here are JPEG files; the published labels name PNG files with the same pixels."""
    return (MINI / f"expected_{split}.csv").read_text().replace(".png", ".jpg")


@pytest.fixture(scope="module")
def test_labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "test.csv"
    path.write_text(mini_labels("test"))
    return path


def test_transform_equals_the_published_one(tmp_path):
    golden = np.load(ROOT / "tests" / "golden" / "test-transform.npz")
    first = mini_labels("train").splitlines()[:2]
    assert "redkitchen/seq-01/frame-000000.color.jpg" in first[1]
    (tmp_path / "first.csv").write_text("\n".join(first))
    ours = to_input(CameraPoseDataset(MINI, tmp_path / "first.csv")[0]["img"][None])[0].numpy()
    assert np.abs(ours[:, golden["rows"]] - golden["frame"]).max() <= 0.02
    assert np.abs(ours.mean(axis=(1, 2)) - golden["frame_mean"]).max() <= 0.02


def predict(tmp_path, test_labels, script, *arguments):
    """Test on the real frames; returns what was printed, the predictions, and the published ones."""
    predictions = tmp_path / "predictions.csv"
    output = run_here(script, "posenet", "eval", "none", MINI, test_labels, ROOT / "config.json", *arguments,
                      "--preset", "7Scenes", "--set", "backbone_type=mobilenet", "--predictions_path", predictions,
                      "--output_dir", tmp_path)
    return output, pd.read_csv(predictions), pd.read_csv(PUBLISHED / "errors_test.csv")


def test_the_published_apr_gives_its_published_errors(tmp_path, test_labels):
    output, ours, published = predict(tmp_path, test_labels, "main.py", "--checkpoint_path", APR)
    assert np.abs(ours["position_error_m"] - published["position_error_m"]).max() <= 1e-3
    assert np.abs(ours["orientation_error_deg"] - published["orientation_error_deg"]).max() <= 0.02
    assert "\nMedian pose error: 0.140[m], 4.731[deg]\n" in output
    assert np.allclose(ours[["t1", "t2", "t3"]], published[["t1", "t2", "t3"]], atol=1e-3)
    quaternions = published[["q1", "q2", "q3", "q4"]].to_numpy()
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    assert np.allclose(ours[["q1", "q2", "q3", "q4"]], quaternions, atol=1e-4)


def test_the_published_pae_gives_its_published_errors(tmp_path, test_labels):
    output, ours, published = predict(tmp_path, test_labels, "main_learn_pose_encoding.py", APR,
                                      "--encoder_checkpoint_path", PAE)
    assert np.abs(ours["position_error_m"] - published["pae_position_error_m"]).max() <= 1e-3
    assert np.abs(ours["orientation_error_deg"] - published["pae_orientation_error_deg"]).max() <= 0.02
    assert "\nThe APR's own median: 0.140[m], 4.731[deg]\n" in output
    assert "\nMedian pose error: 0.162[m], 5.123[deg]\n" in output


def test_encoded_training_poses_improve_the_published_apr(tmp_path, test_labels):
    training_labels = tmp_path / "train.csv"
    training_labels.write_text(mini_labels("train"))
    common = ("--preset", "7Scenes", "--output_dir", tmp_path, "--cache_dir", tmp_path / "cache",
              "--set", "backbone_type=mobilenet", "n_workers=0", "n_epochs=100")
    pae = weights_of(run_here("main_learn_pose_encoding.py", "posenet", "train", "none", MINI, training_labels,
                              ROOT / "config.json", APR, *common))
    for solver in ("linear", "inversion"):
        output = run_here("main_refine_apr.py", "posenet", "optimize", "none", MINI, test_labels, ROOT / "config.json",
                          APR, pae, "--ref_poses_file", training_labels, "--solver", solver, *common)
        for kind, limit in (("position", -15), ("orientation", -5)):
            pattern = rf"^Change of the median {kind} error: (\S+)% \(95% interval \S+% to (\S+)%\)$"
            change, high = map(float, re.search(pattern, output, flags=re.MULTILINE).groups())
            assert change < limit and high < 0, output[-800:]


def test_published_label_files_are_read():
    frames = {"7scenes_all_scenes": 26000, "cambridge_four_scenes": 3833,
              "abs_cambridge_pose_sorted.csv_GreatCourt_train": 1532}
    for name, n_frames in frames.items():
        assert len(read_labels(MINI.parent / "labels" / f"{name}.csv")) == n_frames
