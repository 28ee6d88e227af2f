"""Poses in other tools' formats, against evo, a rendered frame and an independent conversion."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_module_here, write_labels
from transforms3d.quaternions import qinverse, quat2mat, rotate_vector

from datasets.labels import POSE_COLUMNS, read_labels
from util import poses
from util.metrics import pose_err

random = np.random.default_rng(0)


@pytest.fixture
def files(tmp_path):
    """Labels and predictions of seven frames, close to each other; quaternions of any norm and sign."""
    truth = random.standard_normal((7, 7))
    for name, values in (("labels", truth), ("predictions", truth + 0.1 * random.standard_normal((7, 7)))):
        write_labels(tmp_path / f"{name}.csv", [f"attic,test,seq-01,attic/seq-01/frame-{i:06d}.color.png,"
                                                + ",".join(f"{value:.9f}" for value in pose) for i, pose in enumerate(values)])
    return tmp_path


def convert(files, name, form, convention):
    status, output, errors = run_module_here(poses, files / f"{name}.csv", files / f"{name}.{form}", "--format", form,
                                             "--convention", convention)
    assert status is None or status == 0, errors
    assert output == f"{files / f'{name}.{form}'}: 7 poses\n"
    return files / f"{name}.{form}"


@pytest.mark.parametrize("convention", poses.CONVENTIONS)
def test_evo_reads_the_trajectories_and_finds_our_errors(files, convention, monkeypatch):
    monkeypatch.setenv("HOME", str(files))  # evo writes its settings there when it is imported
    from evo.core import metrics
    from evo.tools.file_interface import read_tum_trajectory_file

    truth, estimate = (read_tum_trajectory_file(convert(files, name, "tum", convention)) for name in ("labels", "predictions"))
    assert truth.timestamps.tolist() == list(range(7))
    tables = [pd.read_csv(files / f"{name}.csv")[POSE_COLUMNS].to_numpy() for name in ("predictions", "labels")]
    expected = [errors.numpy() for errors in pose_err(*map(torch.tensor, tables))]
    for relation, errors in zip((metrics.PoseRelation.translation_part, metrics.PoseRelation.rotation_angle_deg), expected):
        ape = metrics.APE(relation)
        ape.process_data((truth, estimate))
        assert np.allclose(ape.error, errors, atol=1e-4)

    # Predictions in another order, and without some frames.
    pd.read_csv(files / "predictions.csv").iloc[[5, 0, 3]].to_csv(files / "some.csv", index=False)
    status, _, errors = run_module_here(poses, files / "some.csv", files / "some.tum", "--format", "tum", "--convention", convention,
                                        "--frames", files / "labels.csv")
    assert not status, errors
    some = read_tum_trajectory_file(files / "some.tum")
    assert some.timestamps.tolist() == [0, 3, 5] and np.array_equal(some.positions_xyz, estimate.positions_xyz[[0, 3, 5]])


@pytest.mark.parametrize("convention", poses.CONVENTIONS)
def test_visloc_poses_lead_back_to_the_labels(files, convention):
    lines = convert(files, "labels", "visloc", convention).read_text().splitlines()
    table = pd.read_csv(files / "labels.csv")
    assert [line.split()[0] for line in lines] == table["img_path"].tolist()
    for line, pose in zip(lines, table[POSE_COLUMNS].to_numpy()):
        numbers = np.array(line.split()[1:], float)
        quaternion = numbers[:4] if convention == "CambridgeLandmarks" else qinverse(numbers[:4])
        assert np.allclose(quat2mat(quaternion), quat2mat(pose[3:]), atol=1e-6)
        assert np.allclose(-rotate_vector(numbers[4:], qinverse(numbers[:4])), pose[:3], atol=1e-6)  # the centre, -R^T t


def test_labels_of_predictions_are_a_label_file(files):
    (files / "predictions.csv").write_text("\n".join(
        line + (",position_error_m" if i == 0 else ",0.5") for i, line in enumerate((files / "predictions.csv").read_text().splitlines())))
    written = read_labels(convert(files, "predictions", "labels", "7Scenes"))
    assert list(pd.read_csv(files / "predictions.labels")) == list(pd.read_csv(files / "labels.csv"))
    assert np.allclose(written[POSE_COLUMNS], pd.read_csv(files / "predictions.csv")[POSE_COLUMNS])


def test_what_cannot_be_converted_is_named(files):
    def refused(name, form, *more):
        status, _, errors = run_module_here(poses, files / f"{name}.csv", files / "out.txt", "--format", form, "--convention", "7Scenes", *more)
        assert status == 2 and errors.count("\n") == 1 and not (files / "out.txt").exists()
        return errors

    pd.read_csv(files / "labels.csv").drop(columns=["scene", "split", "seq"]).to_csv(files / "predicted.csv", index=False)
    assert "predicted.csv: column 'scene' is missing" in refused("predicted", "labels")
    (files / "spaced.csv").write_text((files / "labels.csv").read_text().replace("frame-000002", "frame 2"))
    assert "spaced.csv: row 4: img_path 'attic/seq-01/frame 2.color.png' has a space" in refused("spaced", "visloc")
    (files / "no_poses.csv").write_text("img_path\na.png\n")
    assert "no_poses.csv: column 't1' is missing" in refused("no_poses", "tum")
    assert "absent.csv: not a readable label file" in refused("absent", "tum")
    (files / "others.csv").write_text((files / "predictions.csv").read_text().replace("frame-000003", "frame-000009"))
    assert ("others.csv: row 5: img_path 'attic/seq-01/frame-000009.color.png' is not in the file of --frames, which begins with "
            "'attic/seq-01/frame-000000.color.png': these are poses of other frames (1 of 7)") in refused("others", "tum", "--frames", files / "labels.csv")
    (files / "twice.csv").write_text((files / "predictions.csv").read_text().replace("frame-000003", "frame-000002"))
    assert "twice.csv: row 5: img_path 'attic/seq-01/frame-000002.color.png' is there twice" in refused("twice", "tum", "--frames", files / "labels.csv")
    assert "--frames is for tum" in refused("others", "visloc", "--frames", files / "labels.csv")
    status, _, errors = run_module_here(poses, files / "labels.csv", files / "labels.csv", "--format", "tum", "--convention", "7Scenes")
    assert status == 2 and "is the file to convert" in errors
    status, _, errors = run_module_here(poses, files / "predictions.csv", files / "labels.csv", "--format", "tum", "--convention", "7Scenes",
                                        "--frames", files / "labels.csv")
    assert status == 2 and "is the file to count the frames by" in errors
