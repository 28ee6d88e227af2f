"""Predicted poses as a COLMAP model, as pycolmap reads it."""
import shutil

import numpy as np
import pycolmap
import pytest
from conftest import run_module_here, write_labels
from prepare_layouts import call_well, error_of, listing, write_model
from transforms3d.quaternions import quat2mat

from datasets import export_poses, prepare_colmap
from datasets.export_poses import COLMAP_FILES

IMAGES = {"seq1/a.jpg": 3, "seq1/b.jpg": 7, "seq2/a.jpg": 7}  # {name in the model: camera}
CAMERAS = {3: ("PINHOLE", 640, 480, (500.5, 501, 320, 240)),
           7: ("SIMPLE_RADIAL", 100, 80, (90.123456789012, 50, 40, -0.01)),
           9: ("OPENCV", 64, 48, (50, 51, 32, 24, 0.1, -0.02, 0.003, -0.0004))}


def write_cameras(folder, text, images=IMAGES, cameras=CAMERAS):
    """Write a COLMAP model of these images and cameras; image ids are 11, 12, ..., in this order."""
    model = pycolmap.Reconstruction()
    for i, (name, width, height, params) in cameras.items():
        model.add_camera_with_trivial_rig(
            pycolmap.Camera(camera_id=i, model=name, width=width, height=height, params=params))
    for i, (name, camera) in enumerate(images.items(), start=11):
        model.add_image_with_trivial_frame(pycolmap.Image(name=name, camera_id=camera, image_id=i),
                                           pycolmap.Rigid3d(pycolmap.Rotation3d([0, 0, 0, 1]), [0, 0, i]))
    folder.mkdir(parents=True)
    (model.write_text if text else model.write_binary)(folder)
    return folder


def write_predictions(path, names, scale=1.0):
    """Write predictions of random poses, with quaternions of any norm and sign. Returns them, N x 7."""
    poses = np.random.default_rng(3).standard_normal((len(names), 7)) * ([scale] * 3 + [1] * 4)
    write_labels(path, [",".join(["attic", "test", "s", name, *map(repr, pose)])
                        for name, pose in zip(names, poses.tolist(), strict=True)])
    return poses


def export(folder, *more):
    """What export_poses prints for predictions.csv and the model `sparse` of a folder, written to `predicted`."""
    return call_well(export_poses, folder / "predictions.csv", folder / "predicted", "--format", "colmap",
                     "--model", folder / "sparse", *more)


def images_of(folder):
    """The images of a model, as pycolmap reads it: {name: image}."""
    model = pycolmap.Reconstruction(folder)
    assert model.num_points3D() == 0 and model.num_reg_images() == model.num_images()
    return {image.name: image for image in model.images.values()}


@pytest.mark.parametrize("text", (True, False))
@pytest.mark.parametrize("convention", export_poses.CONVENTIONS)
def test_pycolmap_reads_the_predicted_poses_and_the_cameras_of_the_model(convention, text, tmp_path):
    write_cameras(tmp_path / "sparse", text)
    names = ["seq2/a.jpg", "seq1/a.jpg", "./seq1//b.jpg"]
    poses = write_predictions(tmp_path / "predictions.csv", names, scale=1e5)
    assert export(tmp_path, "--convention", convention) == (
        f"{tmp_path / 'predicted'}: 3 poses, 3 with the cameras of their images in the model\n")
    assert {path.name for path in (tmp_path / "predicted").iterdir()} == set(COLMAP_FILES)
    images = images_of(tmp_path / "predicted")
    assert set(images) == set(IMAGES)
    for name, pose in zip(("seq2/a.jpg", "seq1/a.jpg", "seq1/b.jpg"), poses, strict=True):
        image = images[name]
        camera_to_world = image.cam_from_world().inverse()
        rotation = quat2mat(pose[3:])
        np.testing.assert_allclose(camera_to_world.rotation.matrix(),
                                   rotation.T if convention == "CambridgeLandmarks" else rotation, atol=1e-12)
        np.testing.assert_allclose(camera_to_world.translation, pose[:3], atol=1e-8)  # at positions of 1e5
        assert image.image_id == 11 + list(IMAGES).index(name) and image.camera_id == IMAGES[name]
        kind, width, height, params = CAMERAS[image.camera_id]
        assert (image.camera.model.name, image.camera.width, image.camera.height) == (kind, width, height)
        assert image.camera.params.tolist() == list(params)


@pytest.mark.parametrize("text", (True, False))
def test_a_colmap_model_comes_back_by_way_of_its_labels(text, tmp_path):
    truth = write_model(tmp_path / "sparse", text)
    call_well(prepare_colmap, tmp_path / "sparse", tmp_path / "attic", "--every", 8)
    rows = [(tmp_path / f"attic/attic_{split}.csv").read_text().splitlines() for split in ("train", "test")]
    (tmp_path / "predictions.csv").write_text("\n".join([*rows[0], *rows[1][1:]]))
    export(tmp_path, "--convention", "colmap")
    model = pycolmap.Reconstruction(tmp_path / "sparse")
    before = {model.image(i).name: model.image(i) for i in model.reg_image_ids()}
    after = images_of(tmp_path / "predicted")
    assert set(after) == set(before) == set(truth)
    for name, image in before.items():
        assert after[name].image_id == image.image_id and after[name].camera_id == image.camera_id
        np.testing.assert_allclose(after[name].cam_from_world().matrix(), image.cam_from_world().matrix(), atol=1e-6)
    assert {name for name, _ in prepare_colmap.read_model(tmp_path / "predicted")} == set(truth)  # and we read it too


def test_a_text_model_without_lines_of_points_gives_all_its_cameras(tmp_path):
    write_cameras(tmp_path / "sparse", True)
    path = tmp_path / "sparse/images.txt"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if line) + "\n")
    for name in ("rigs.txt", "frames.txt"):
        (tmp_path / "sparse" / name).unlink()
    write_predictions(tmp_path / "predictions.csv", IMAGES)
    export(tmp_path, "--convention", "colmap")
    assert {name: image.camera_id for name, image in images_of(tmp_path / "predicted").items()} == IMAGES


@pytest.mark.parametrize("text", (True, False))
def test_other_images_take_the_only_camera_of_the_model(text, tmp_path):
    write_cameras(tmp_path / "sparse", text, dict.fromkeys(IMAGES, 9), {9: CAMERAS[9]})
    write_predictions(tmp_path / "predictions.csv", ["x/new.jpg", "seq1/b.jpg", "newer.jpg"])
    assert export(tmp_path, "--convention", "7Scenes") == (
        f"{tmp_path / 'predicted'}: 3 poses, 1 with the cameras of their images in the model; 2 with its only camera, "
        "since it has no image 'x/new.jpg' (its images have names such as 'seq1/a.jpg')\n")
    assert {name: (image.image_id, image.camera_id) for name, image in images_of(tmp_path / "predicted").items()} == {
        "x/new.jpg": (14, 9), "seq1/b.jpg": (12, 9), "newer.jpg": (15, 9)}


def test_a_folder_before_the_names_of_the_model_is_left_out_as_asked(tmp_path):
    write_cameras(tmp_path / "sparse", False)
    write_predictions(tmp_path / "predictions.csv", [f"attic/images/{name}" for name in IMAGES])
    export(tmp_path, "--convention", "colmap", "--name_parts", 2)
    assert {name: image.camera_id for name, image in images_of(tmp_path / "predicted").items()} == IMAGES


def test_a_model_that_we_wrote_is_replaced(tmp_path):
    write_cameras(tmp_path / "sparse", False)
    (tmp_path / "predicted").mkdir()  # empty
    for names in (list(IMAGES), ["seq1/a.jpg"]):
        write_predictions(tmp_path / "predictions.csv", names)
        export(tmp_path, "--convention", "colmap")
        assert set(images_of(tmp_path / "predicted")) == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"sparse", "predicted", "predictions.csv"}


def test_a_failure_leaves_the_model_that_exists(tmp_path, monkeypatch):
    write_cameras(tmp_path / "sparse", False)
    write_predictions(tmp_path / "predictions.csv", list(IMAGES))
    export(tmp_path, "--convention", "colmap")
    before = listing(tmp_path)
    rename = export_poses.os.rename

    def fail(source, target):
        if str(source).endswith(".part"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(export_poses.os, "rename", fail)
    error = error_of(export_poses, tmp_path / "predictions.csv", tmp_path / "predicted", "--format", "colmap",
                     "--model", tmp_path / "sparse", "--convention", "colmap")
    assert f"{tmp_path / 'predicted'}: cannot be written: No space left on device" in error
    assert listing(tmp_path) == before


MISTAKES = {  # {case: (names of the images, change of the folder, arguments, words)}
    "no --model": (IMAGES, None, ["--format", "colmap"], "--format colmap needs --model"),
    "no such model": (IMAGES, lambda folder: shutil.rmtree(folder / "sparse"), None, "sparse: no COLMAP model"),
    "damaged model": (IMAGES, lambda folder: (folder / "sparse/images.bin").write_bytes(b"\1"), None,
                      "images.bin: a truncated or damaged file"),
    "unknown image": (["seq1/a.jpg", "new.jpg", "newer.jpg"], None, None,
                      "predictions.csv: row 3: the model has no image 'new.jpg', and 3 cameras that could be its own "
                      "(2 of 3); its images have names such as 'seq1/a.jpg'; name a model that has the image"),
    "a folder before": (["attic/seq1/a.jpg"], None, None, "no image 'attic/seq1/a.jpg', and 3 cameras that could be "
                        "its own (1 of 1); its images have names such as 'seq1/a.jpg'; set --name_parts 2"),
    "a space": (["seq1/a b.jpg"], None, None, "row 2: img_path 'seq1/a b.jpg' has a space in its name"),
    "a name twice": (["seq1/a.jpg", "seq1/./a.jpg"], None, None,
                     "rows 2 and 3: both images have the name 'seq1/a.jpg', and colmap has one line per name; delete"),
    "a file": (IMAGES, lambda folder: (folder / "predicted").write_text(""), None, "predicted: exists, and is not"),
    "a folder of others": (IMAGES, lambda folder: shutil.copytree(folder / "sparse", folder / "predicted"), None,
                           "predicted: exists, and is not a model that export_poses wrote; name another folder"),
    "others' files": (IMAGES, lambda folder: write_cameras(folder / "predicted", True) and [
        (folder / f"predicted/{name}.txt").unlink() for name in ("rigs", "frames")], None, "predicted: exists"),
    "the model": (IMAGES, lambda folder: (folder / "predicted").symlink_to(folder / "sparse"), None,
                  "predicted is the model to take the cameras from, which stays as it is; name another"),
    "--frames": (IMAGES, None, ["--format", "colmap", "--frames", "x.csv"], "--frames is for tum"),
    "--model of tum": (IMAGES, None, ["--format", "tum", "--model", "sparse"], "--model is for colmap"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_in_one_clear_line(case, tmp_path):
    names, change, arguments, words = MISTAKES[case]
    write_cameras(tmp_path / "sparse", False)
    write_predictions(tmp_path / "predictions.csv", list(names))
    if change:
        change(tmp_path)
    before = listing(tmp_path)
    arguments = arguments or ["--format", "colmap", "--model", tmp_path / "sparse"]
    assert words in error_of(export_poses, tmp_path / "predictions.csv", tmp_path / "predicted",
                             "--convention", "colmap", *arguments)
    assert listing(tmp_path) == before


def test_rejected_rows_are_left_out(tmp_path, caplog):
    write_cameras(tmp_path / "sparse", False)
    write_predictions(tmp_path / "predictions.csv", list(IMAGES))
    header, *rows = (tmp_path / "predictions.csv").read_text().splitlines()
    flags = (f"{row},{rejected}" for row, rejected in zip(rows, (False, True, False), strict=True))
    (tmp_path / "predictions.csv").write_text("\n".join([f"{header},rejected", *flags]))
    status, output, _ = run_module_here(export_poses, tmp_path / "predictions.csv", tmp_path / "predicted", "--format",
                                        "colmap", "--convention", "colmap", "--model", tmp_path / "sparse")
    assert status == 0 and "2 poses" in output and "1 rejected frames left out" in caplog.text
    assert set(images_of(tmp_path / "predicted")) == {"seq1/a.jpg", "seq2/a.jpg"}
