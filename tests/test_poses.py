"""Poses in other tools' formats, against evo, a rendered frame and an independent conversion."""
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_module_here, write_labels
from transforms3d.quaternions import qinverse, quat2mat, rotate_vector

from datasets import export_poses
from datasets.descriptions import describe
from datasets.labels import POSE_COLUMNS, read_labels
from util.metrics import pose_err


@pytest.fixture
def files(tmp_path):
    """Labels and predictions of seven frames, close to each other; quaternions of any norm and sign."""
    random = np.random.default_rng(0)
    truth = random.standard_normal((7, 7))
    for name, values in (("labels", truth), ("predictions", truth + 0.1 * random.standard_normal((7, 7)))):
        write_labels(tmp_path / f"{name}.csv",
                     [",".join([f"attic,test,seq-01,attic/seq-01/frame-{i:06d}.color.png", *(f"{x:.9f}" for x in pose)])
                      for i, pose in enumerate(values)])
    return tmp_path


def convert(files, name, form, convention):
    status, output, errors = run_module_here(export_poses, files / f"{name}.csv", files / f"{name}.{form}",
                                             "--format", form, "--convention", convention)
    assert status is None or status == 0, errors
    assert output == f"{files / f'{name}.{form}'}: 7 poses\n"
    return files / f"{name}.{form}"


@pytest.mark.parametrize("convention", export_poses.CONVENTIONS)
def test_evo_reads_the_trajectories_and_finds_our_errors(files, convention, monkeypatch):
    monkeypatch.setenv("HOME", str(files))  # evo writes its settings there when it is imported
    from evo.core import metrics
    from evo.tools.file_interface import read_tum_trajectory_file

    truth, estimate = (read_tum_trajectory_file(convert(files, name, "tum", convention))
                       for name in ("labels", "predictions"))
    assert truth.timestamps.tolist() == list(range(7))
    tables = [pd.read_csv(files / f"{name}.csv")[POSE_COLUMNS].to_numpy() for name in ("predictions", "labels")]
    expected = [errors.numpy() for errors in pose_err(*map(torch.tensor, tables))]
    relations = metrics.PoseRelation.translation_part, metrics.PoseRelation.rotation_angle_deg
    for relation, errors in zip(relations, expected, strict=True):
        ape = metrics.APE(relation)
        ape.process_data((truth, estimate))
        assert np.allclose(ape.error, errors, atol=1e-4)

    # Predictions in another order, and without some frames.
    pd.read_csv(files / "predictions.csv").iloc[[5, 0, 3]].to_csv(files / "some.csv", index=False)
    status, _, errors = run_module_here(export_poses, files / "some.csv", files / "some.tum", "--format", "tum",
                                        "--convention", convention, "--frames", files / "labels.csv")
    assert not status, errors
    some = read_tum_trajectory_file(files / "some.tum")
    assert some.timestamps.tolist() == [0, 3, 5]
    assert np.array_equal(some.positions_xyz, estimate.positions_xyz[[0, 3, 5]])


def test_the_convention_is_asked_for_where_nothing_says_it(files):
    def exported(*more):
        status, _, errors = run_module_here(export_poses, files / "predictions.csv", files / "poses.tum", "--format",
                                            "tum", *more)
        return (files / "poses.tum").read_text() if not status else errors

    turned, as_they_are = (exported("--convention", name) for name in ("CambridgeLandmarks", "7Scenes"))
    assert turned != as_they_are
    assert "predictions.csv: nothing says whose convention its quaternions have; give --convention" in exported()
    (files / "predictions.json").write_text('{"unit": "m", "convention": "CambridgeLandmarks"}')
    assert exported() == turned
    (files / "predictions.json").unlink()
    (files / "predictions.csv").write_text((files / "predictions.csv").read_text().replace("attic,", "chess,"))
    assert exported() == as_they_are and exported("--convention", "CambridgeLandmarks") == turned


@pytest.mark.parametrize("convention", export_poses.CONVENTIONS)
def test_visloc_poses_lead_back_to_the_labels(files, convention):
    lines = convert(files, "labels", "visloc", convention).read_text().splitlines()
    table = pd.read_csv(files / "labels.csv")
    assert [line.split()[0] for line in lines] == [f"frame-{i:06d}.color.png" for i in range(7)]
    for line, pose in zip(lines, table[POSE_COLUMNS].to_numpy(), strict=True):
        numbers = np.array(line.split()[1:], float)
        quaternion = numbers[:4] if convention == "CambridgeLandmarks" else qinverse(numbers[:4])
        assert np.allclose(quat2mat(quaternion), quat2mat(pose[3:]), atol=1e-6)
        centre = -rotate_vector(numbers[4:], qinverse(numbers[:4]))  # -R^T t
        assert np.allclose(centre, pose[:3], atol=1e-6)


def test_labels_of_predictions_are_a_label_file(files):
    header, *rows = (files / "predictions.csv").read_text().splitlines()
    (files / "predictions.csv").write_text("\n".join([f"{header},position_error_m", *(f"{row},0.5" for row in rows)]))
    written = read_labels(convert(files, "predictions", "labels", "7Scenes"))
    assert list(pd.read_csv(files / "predictions.labels")) == list(pd.read_csv(files / "labels.csv"))
    assert np.allclose(written[POSE_COLUMNS], pd.read_csv(files / "predictions.csv")[POSE_COLUMNS])
    assert describe(files / "predictions.labels") == {"unit": "m", "convention": "7Scenes"}


@pytest.mark.parametrize("more, names", [
    ([], ["1.jpg", "2.jpg", "3.jpg"]),
    (["--name_parts", 1], ["1.jpg", "2.jpg", "3.jpg"]),
    (["--name_parts", 2], ["nexus/1.jpg", "milestone/2.jpg", "3.jpg"]),
    (["--name_parts", 9], ["query/night/nexus/1.jpg", "night/milestone/2.jpg", "3.jpg"]),
])
def test_a_visloc_name_is_the_end_of_a_path(tmp_path, more, names):
    paths = "query/night/nexus/1.jpg", "night/milestone/2.jpg", "3.jpg"
    write_labels(tmp_path / "labels.csv", [f"attic,test,s,{path},1,2,3,1,0,0,0" for path in paths])
    status, _, errors = run_module_here(export_poses, tmp_path / "labels.csv", tmp_path / "out.txt",
                                        "--format", "visloc", "--convention", "7Scenes", *more)
    assert not status, errors
    assert [line.split()[0] for line in (tmp_path / "out.txt").read_text().splitlines()] == names


@pytest.mark.parametrize("more, paths, problem", [
    ([], ["day/nexus/1.jpg", "2.jpg", "night/nexus/1.jpg"],
     "rows 2 and 4: both images have the name '1.jpg', and visloc has one line per name; raise --name_parts above 1"),
    (["--name_parts", 2], ["day/nexus/1.jpg", "night/nexus/1.jpg"],
     "rows 2 and 3: both images have the name 'nexus/1.jpg', and visloc has one line per name; raise --name_parts "
     "above 2"),
    (["--name_parts", 3], ["day/nexus/1.jpg", "night/nexus/1.jpg"], None),
    (["--name_parts", 9], ["a/1.jpg", "a/1.jpg"],
     "rows 2 and 3: both images have the name 'a/1.jpg', and visloc has one line per name; delete one of the rows"),
    ([], ["a/./1.jpg", "a/1.jpg"],
     "rows 2 and 3: both images have the name '1.jpg', and visloc has one line per name; delete one of the rows"),
    ([], ["day 1/nexus/1.jpg"], None),
    (["--name_parts", 3], ["a/day 1/nexus/1.jpg"],
     "row 2: img_path 'a/day 1/nexus/1.jpg' has a space in its name 'day 1/nexus/1.jpg', where visloc would cut it; "
     "rename it"),
])
def test_visloc_names_are_without_spaces_and_each_is_of_one_line(tmp_path, more, paths, problem):
    write_labels(tmp_path / "labels.csv", [f"attic,test,s,{path},1,2,3,1,0,0,0" for path in paths])
    status, _, errors = run_module_here(export_poses, tmp_path / "labels.csv", tmp_path / "out.txt",
                                        "--format", "visloc", "--convention", "7Scenes", *more)
    assert errors == (f"export_poses.py: error: {tmp_path / 'labels.csv'}: {problem}\n" if problem else "")
    assert status == (2 if problem else 0) and (tmp_path / "out.txt").exists() == (problem is None)


@pytest.mark.parametrize("form, parts, problem", [
    ("visloc", "0", "'0' is not a whole number from 1"), ("visloc", "-1", "'-1' is not a whole number from 1"),
    ("visloc", "1.5", "'1.5' is not a whole number from 1"),
    ("tum", "1", "--name_parts is for visloc and colmap, which name images; leave it out with tum"),
    ("labels", "2", "--name_parts is for visloc and colmap, which name images; leave it out with labels")])
def test_name_parts_are_a_whole_number_and_for_formats_with_names(files, form, parts, problem):
    status, _, errors = run_module_here(export_poses, files / "labels.csv", files / "out.txt", "--format", form,
                                        "--convention", "7Scenes", "--name_parts", parts)
    assert status == 2 and errors.endswith(f"{problem}\n") and not (files / "out.txt").exists()


def test_what_cannot_be_converted_is_named(files):
    def refused(name, form, *more):
        status, _, errors = run_module_here(export_poses, files / f"{name}.csv", files / "out.txt", "--format", form,
                                            "--convention", "7Scenes", *more)
        assert status == 2 and errors.count("\n") == 1 and not (files / "out.txt").exists()
        return errors

    predicted = pd.read_csv(files / "labels.csv").drop(columns=["scene", "split", "seq"])
    predicted.to_csv(files / "predicted.csv", index=False)
    assert "predicted.csv: column 'scene' is missing" in refused("predicted", "labels")
    (files / "spaced.csv").write_text((files / "labels.csv").read_text().replace("frame-000002", "frame 2"))
    assert "spaced.csv: row 4: img_path 'attic/seq-01/frame 2.color.png' has a space" in refused("spaced", "visloc")
    (files / "no_poses.csv").write_text("img_path\na.png\n")
    assert "no_poses.csv: column 't1' is missing" in refused("no_poses", "tum")
    assert "absent.csv: not a readable label file" in refused("absent", "tum")
    counted = "--frames", files / "labels.csv"
    predictions = (files / "predictions.csv").read_text()
    (files / "others.csv").write_text(predictions.replace("frame-000003", "frame-000009"))
    assert ("others.csv: row 5: img_path 'attic/seq-01/frame-000009.color.png' is not in the file of --frames, which "
            "begins with 'attic/seq-01/frame-000000.color.png': these are poses of other frames, or"
            " their paths begin in another folder (1 of 7)"
            ) in refused("others", "tum", *counted)
    (files / "twice.csv").write_text(predictions.replace("frame-000003", "frame-000002"))
    assert ("twice.csv: row 5: img_path 'attic/seq-01/frame-000002.color.png' appears twice"
            ) in refused("twice", "tum", *counted)
    assert "--frames is for tum" in refused("others", "visloc", *counted)
    status, _, errors = run_module_here(export_poses, files / "labels.csv", files / "labels.csv", "--format", "tum",
                                        "--convention", "7Scenes")
    assert status == 2 and "is the file to convert" in errors
    status, _, errors = run_module_here(export_poses, files / "predictions.csv", files / "labels.csv",
                                        "--format", "tum", "--convention", "7Scenes", *counted)
    assert status == 2 and "is the file to count the frames by" in errors
