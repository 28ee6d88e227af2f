"""Label files from COLMAP models."""
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import run_module_here, run_script
from prepare_layouts import NAMES, call_well, error_of, pose_of, read_rows, truncate, write_model

from datasets import prepare_colmap


@pytest.mark.parametrize("text, old", ((True, False), (False, False), (False, True)))
def test_a_colmap_model_gives_back_its_poses(text, old, tmp_path):
    poses = write_model(tmp_path / "model", text)
    if old:  # before COLMAP 3.12, models had neither rigs nor frames
        (tmp_path / "model/rigs.bin").unlink()
        (tmp_path / "model/frames.bin").unlink()
    output = call_well(prepare_colmap, tmp_path / "model", tmp_path / "attic")
    rows = {split: read_rows(tmp_path / f"attic/attic_{split}.csv") for split in ("train", "test")}
    # Ten stretches of 3 or 4 images: the fifth and the tenth are for testing, and one image beside each is left out.
    test = [*(f"seq2/frame{i}.png" for i in (4, 5, 6)), *(f"seq10/frame{i}.png" for i in (10, 11, 12))]
    assert [row[3] for row in rows["test"]] == test
    left_out = ["seq2/frame3.png", "seq2/frame7.png", "seq10/frame9.png"]
    assert [row[3] for row in rows["train"]] == [name for name in NAMES if name not in test + left_out]
    assert "3 frames between training and test stretches are left out of both" in output
    for split in rows:
        for row in rows[split]:
            assert row[:3] == ["attic", split, row[3].split("/")[0]]
            np.testing.assert_allclose(pose_of(row), np.concatenate(poses[row[3]]), atol=1e-12)


def test_a_colmap_model_is_split_as_asked(tmp_path):
    write_model(tmp_path / "model", False, [*NAMES, "lone.png"])
    call_well(prepare_colmap, tmp_path / "model", tmp_path, "--scene", "shed", "--test_sequences", "seq2", "seq-01")
    assert {row[2] for row in read_rows(tmp_path / "shed_train.csv")} == {"seq1", "seq10"}
    test_rows = read_rows(tmp_path / "shed_test.csv")
    assert {row[2] for row in test_rows} == {"seq2", "seq-01"}
    assert ["shed", "test", "seq-01", "lone.png"] in [row[:4] for row in test_rows]
    call_well(prepare_colmap, tmp_path / "model", tmp_path, "--scene", "shed", "--every", 6)
    assert [row[3] for row in read_rows(tmp_path / "shed_test.csv")] == [
        f"seq{sequence}/frame{i}.png" for sequence in (1, 2, 10) for i in (6, 12)]


@pytest.mark.parametrize("below", ("0", "sparse", "sparse/0"))
def test_a_folder_above_a_colmap_model(below, tmp_path):
    write_model(tmp_path / "attic" / below, False)
    output = call_well(prepare_colmap, tmp_path / "attic", tmp_path / "labels")
    assert f"{tmp_path / 'attic' / below}: the model that is read" in output
    assert len(read_rows(tmp_path / "labels/labels_train.csv")) == 27


def test_two_images_scale_a_colmap_model_to_metres(tmp_path):
    poses = write_model(tmp_path / "model", False)
    assert "positions in model units" in call_well(prepare_colmap, tmp_path / "model", tmp_path / "unscaled")
    assert json.loads((tmp_path / "unscaled/unscaled_test.json").read_text()) == {
        "unit": "model units", "convention": "colmap"}
    output = call_well(prepare_colmap, tmp_path / "model", tmp_path / "attic", "--scale_by", NAMES[3], NAMES[20], 2.5)
    assert "positions in metres" in output
    factor = 2.5 / np.linalg.norm(poses[NAMES[3]][0] - poses[NAMES[20]][0])
    for split in ("train", "test"):
        assert json.loads((tmp_path / f"attic/attic_{split}.json").read_text()) == {
            "unit": "m", "convention": "colmap"}
        for row in read_rows(tmp_path / f"attic/attic_{split}.csv"):
            centre, quaternion = poses[row[3]]
            np.testing.assert_allclose(pose_of(row), [*(factor * centre), *quaternion], atol=1e-12)


def test_the_next_commands_are_ready_to_paste_and_few_frames_have_no_pae(tmp_path):
    write_model(tmp_path / "a model", False)
    for name in NAMES:
        (tmp_path / "my images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my images" / name).touch()
    labels = tmp_path / "labels of mine"
    output = call_well(prepare_colmap, tmp_path / "a model", labels, "--scene", "attic", "--images",
                       tmp_path / "my images")
    n_train = len(read_rows(labels / "attic_train.csv"))
    assert n_train < 32 and f"{n_train} training frames are too few for a PAE" in output
    commands = [shlex.split(line) for line in re.findall("^python .*", output, flags=re.MULTILINE)]
    assert [command[1:4] for command in commands] == [["main.py", "posenet", "train"], ["main.py", "posenet", "test"]]
    for command, split in zip(commands, ("train", "test"), strict=True):
        assert command[5:8] == [str(tmp_path / "my images"), str(labels / f"attic_{split}.csv"), "config.json"]


@pytest.mark.parametrize("text", (True, False))
def test_the_images_of_a_rig_have_their_own_poses(text, tmp_path):
    import pycolmap
    model = pycolmap.Reconstruction()
    sensors = [pycolmap.sensor_t(type=pycolmap.SensorType.CAMERA, id=i) for i in (1, 2)]
    for i in (1, 2):
        model.add_camera(pycolmap.Camera(camera_id=i, model="PINHOLE", width=64, height=48, params=[50, 50, 32, 24]))
    rig = pycolmap.Rig(rig_id=1)
    rig.add_ref_sensor(sensors[0])
    rig.add_sensor(sensors[1], pycolmap.Rigid3d(pycolmap.Rotation3d([0, 0, 0, 1]), [1, 0, 0]))
    model.add_rig(rig)
    for number in (1, 2):  # the second frame is not registered
        frame = pycolmap.Frame(frame_id=number, rig_id=1)
        for sensor in sensors:
            frame.add_data_id(pycolmap.data_t(sensor, 10 * number + sensor.id))
        if number == 1:
            frame.rig_from_world = pycolmap.Rigid3d(pycolmap.Rotation3d([0, 0, 0, 1]), [0, 2, 0])
        model.add_frame(frame)
        for i in (1, 2):
            image = pycolmap.Image(name=f"eye {i}/view {number}.jpg", camera_id=i, image_id=10 * number + i)
            image.frame_id = number
            model.add_image(image)
    (model.write_text if text else model.write_binary)(tmp_path)
    frames = dict(prepare_colmap.read_model(tmp_path))
    assert set(frames) == {"eye 1/view 1.jpg", "eye 2/view 1.jpg"}
    np.testing.assert_allclose(frames["eye 1/view 1.jpg"], [0, -2, 0, 1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(frames["eye 2/view 1.jpg"], [-1, -2, 0, 1, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("text", (True, False))
@pytest.mark.parametrize("again", ("seq1/frame8.png", "./seq1/frame8.png", "seq1//frame8.png"))
def test_an_image_twice_in_a_colmap_model(again, text, tmp_path):
    write_model(tmp_path / "model", text, [*NAMES, again])
    error = error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert f"model: image {again} (id 37) is listed as seq1/frame8.png (id 8) already; list each once\n" in error
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("text", (True, False))
def test_several_images_that_leave_the_folder_are_counted(text, tmp_path):
    write_model(tmp_path / "model", text, [*(f"../a/{i}.png" for i in range(6)), "/b.png", "c.png"])
    error = error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert f"{tmp_path / 'model'}: 7 problems: image ../a/0.png leaves " in error
    assert "image ../a/4.png leaves" in error and "image ../a/5.png" not in error and error.endswith("; and 2 more\n")


def test_an_image_of_a_binary_model_without_a_name(tmp_path):
    write_model(tmp_path / "model", False, ["a.png", "b.png"])
    path = tmp_path / "model/images.bin"
    path.write_bytes(path.read_bytes().replace(b"b.png\0", b"\0"))
    assert "model: image id 2 has no name" in error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")


COLMAP_MISTAKES = {
    "no model": (lambda model: shutil.rmtree(model), [], "model: no COLMAP model"),
    "half a model": (lambda model: (model / "images.bin").unlink(), [], "model: no COLMAP model"),
    "no frames": (lambda model: (model / "frames.bin").unlink(), [], "model: not a readable COLMAP model"),
    "truncated name": (lambda model: truncate(model / "images.bin", 80), [], "images.bin: a truncated"),
    "truncated image": (lambda model: truncate(model / "images.bin", 30), [], "images.bin: a truncated"),
    "truncated frames": (lambda model: truncate(model / "frames.bin", 20), [], "frames.bin: a truncated"),
    "truncated points": (lambda model: truncate(model / "points3D.bin", 3), [], "points3D.bin: a truncated"),
    "truncated rigs": (lambda model: truncate(model / "rigs.bin", 23), [], "rigs.bin: a truncated"),
    "empty cameras": (lambda model: truncate(model / "cameras.bin", 0), [], "model: not a readable COLMAP model"),
    "unknown sequence": (None, ["--test_sequences", "seq3"], "--test_sequences seq3: no such sequence"),
    "no train frame": (None, ["--test_sequences", "seq1", "seq2", "seq10"], "is in the train split"),
    "no test frame": (None, ["--every", "13"], "is in the test split"),
    "an image that is not there": (None, ["--images", "."], "36 of the model's 36 images do not exist in it: "
                                   "seq1/frame1.png, seq1/frame2.png, seq1/frame3.png, seq1/frame4.png, "
                                   "seq1/frame5.png, and 31 more"),
    "no folder of images": (None, ["--images", "nowhere"], "--images nowhere: no such folder"),
    "not registered": (None, ["--scale_by", NAMES[0], "seq1/dark.png", "2"], "--scale_by seq1/dark.png: not among the "
                       "36 images that the model has placed, such as seq1/frame1.png"),
    "no distance": (None, ["--scale_by", *NAMES[:2], "0"], "--scale_by: '0' is no distance in metres"),
    "no number": (None, ["--scale_by", *NAMES[:2], "2m"], "--scale_by: '2m' is no distance in metres"),
    "one place": (None, ["--scale_by", NAMES[0], NAMES[0], "2"], "were taken from one place"),
    "scene with a slash": (None, ["--scene", "a/b"], "--scene 'a/b'"),
}


@pytest.mark.parametrize("case", COLMAP_MISTAKES)
def test_a_mistake_with_a_colmap_model_ends_in_one_clear_line(case, tmp_path):
    break_it, more, words = COLMAP_MISTAKES[case]
    write_model(tmp_path / "model", False)
    if break_it:
        break_it(tmp_path / "model")
    assert words in error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels", *more)
    assert not (tmp_path / "labels").exists()


def test_a_colmap_model_without_registered_images(tmp_path):
    write_model(tmp_path / "model", True, [])
    process = run_script("-m", "datasets.prepare_colmap", tmp_path / "model", tmp_path / "labels")
    assert process.returncode == 2 and process.stderr.count("\n") == 1  # nor does pycolmap log there
    assert "no registered image" in process.stderr


def test_two_ways_to_split_exclude_each_other(tmp_path):
    status, _, errors = run_module_here(prepare_colmap, tmp_path, tmp_path, "--every", "3", "--test_sequences", "seq1")
    assert status == 2 and "not allowed with" in errors
    status, _, errors = run_module_here(prepare_colmap, tmp_path, tmp_path, "--every", "1")
    assert status == 2 and "'1' is not a whole number from 2" in errors
