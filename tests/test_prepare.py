"""Label files from official downloads and from COLMAP models; and downloading, against a server that misbehaves."""
import csv
import io
import os
import re
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import MINI, ROOT, needs_real_frames, run_module_here, run_script

from datasets import downloads, prepare_7scenes, prepare_cambridge, prepare_colmap
from datasets.labels import read_labels
from util.errors import first_five

TURN = "0 -1 0 {x}\n1 0 0 2\n0 0 1 3\n0 0 0 1\n"  # a quarter turn about z: the quaternion is (r, 0, 0, r), r = sqrt(1/2)


def call_well(module, *arguments):
    status, output, errors = run_module_here(module, *arguments)
    assert status == 0, errors
    return output


def error_of(module, *arguments):
    """The one line on stderr of a run that must end with exit status 2."""
    status, output, errors = run_module_here(module, *arguments)
    assert status == 2 and errors.count("\n") == 1, output + errors
    return errors


def write_7scenes(root, scene="chess"):
    """A scene as the official one, unpacked: seq-01 for training, seq-02 for testing."""
    for sequence, split in ((1, "Train"), (2, "Test")):
        folder = root / scene / f"seq-{sequence:02d}"
        folder.mkdir(parents=True)
        (root / scene / f"{split}Split.txt").write_text(f"sequence{sequence}\r\n")
        for i in range(3):
            (folder / f"frame-{i:06d}.color.png").write_bytes(os.urandom(2000))
            (folder / f"frame-{i:06d}.depth.png").write_bytes(b"")
            (folder / f"frame-{i:06d}.pose.txt").write_text(TURN.format(x=sequence * 10 + i))
    return root / scene


def write_archive(path, folder):
    """A scene's folder as an archive like the official ones: each sequence an archive within it."""
    with zipfile.ZipFile(path, "w") as outer:
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                outer.write(entry, f"{folder.name}/{entry.name}")
                continue
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as sequence:
                for file in sorted(entry.iterdir()):
                    sequence.write(file, f"{entry.name}/{file.name}")
            outer.writestr(f"{folder.name}/{entry.name}.zip", inner.getvalue())
    return path


def write_cambridge(root, scene="ShopFacade"):
    """A scene as the official one; returns its split files' lines: {split: lines}."""
    random = np.random.default_rng(len(scene))
    lines = {"train": [], "test": []}
    for sequence, split in (("seq10", "train"), ("seq2", "train"), ("seq3", "test")):
        for i in (2, 1):
            image = root / scene / sequence / f"frame{i:05d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"")
            lines[split].append(" ".join([f"{sequence}/{image.name}", *(f"{x:.6f}" for x in random.standard_normal(7))]))
    for split in lines:
        header = ["Visual Landmark Dataset V1", "ImageFile, Camera Position [X Y Z W P Q R]", ""]
        (root / scene / f"dataset_{split}.txt").write_text("\n".join([*header, *lines[split]]) + "\n")
    return lines


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def pose_of(row):
    return np.array(row[4:], dtype=float)


# 7Scenes and Cambridge, from what is on disk

@needs_real_frames
def test_real_frames_get_the_published_labels(tmp_path):
    for path in MINI.glob("redkitchen/**/*.*"):
        copy = tmp_path / path.relative_to(MINI).with_name(path.name.replace(".jpg", ".png"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    for split in ("train", "test"):
        rows = read_rows(tmp_path / f"abs_7scenes_pose.csv_redkitchen_{split}.csv")
        expected = read_rows(MINI / f"expected_{split}.csv")
        assert [row[:4] for row in rows] == [row[:4] for row in expected]
        difference = np.abs([pose_of(a) - pose_of(b) for a, b in zip(rows, expected)])
        assert difference[:, :3].max() < 1e-6 and difference[:, 3:].max() < 1e-5


def test_7scenes_label_files(tmp_path):
    for scene in ("office", "chess", "attic"):
        write_7scenes(tmp_path, scene)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".trash" / "seq-01").mkdir(parents=True)
    output = call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    names = {f"abs_7scenes_pose.csv_{scene}_{split}.csv"
             for scene in ("office", "chess", "attic") for split in ("train", "test")}
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {*names, "7scenes_all_scenes.csv"}
    for row, x in zip(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv"), (20, 21, 22), strict=True):
        assert row[:4] == ["chess", "test", "seq-02", f"chess/seq-02/frame-{x - 20:06d}.color.png"]
        np.testing.assert_allclose(pose_of(row), [x, 2, 3, 0.5 ** 0.5, 0, 0, 0.5 ** 0.5], atol=1e-9)
    together = read_rows(tmp_path / "labels/7scenes_all_scenes.csv")
    assert [row[0] for row in together] == ["chess"] * 3 + ["office"] * 3  # no other than the official ones
    assert {row[1] for row in together} == {"train"}
    assert "7scenes_all_scenes.csv has chess, office, not chess, fire" in output

    # A scene asked for by name leaves the file of all scenes alone.
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--scenes", "attic")
    assert read_rows(tmp_path / "labels/7scenes_all_scenes.csv") == together


def test_scenes_of_ones_own_make_the_file_of_all_scenes(tmp_path):
    for scene in ("cellar", "attic", "cellar.part"):  # the last: what is being written, or was broken off
        write_7scenes(tmp_path, scene)
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    assert [row[0] for row in read_rows(tmp_path / "7scenes_all_scenes.csv")] == ["attic"] * 3 + ["cellar"] * 3


def test_jpg_frames_do_where_there_are_no_png_ones(tmp_path):
    for path in write_7scenes(tmp_path).glob("seq-01/*.color.png"):
        path.rename(path.with_suffix(".jpg"))
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    assert read_rows(tmp_path / "7scenes_all_scenes.csv")[0][3] == "chess/seq-01/frame-000000.color.jpg"


def test_png_and_jpg_frames_in_one_sequence_are_all_read(tmp_path):
    sequence = write_7scenes(tmp_path) / "seq-01"
    (sequence / "frame-000001.color.png").rename(sequence / "frame-000001.color.jpg")
    (sequence / "frame-000002.color.jpg").write_bytes(b"")
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    names = ["frame-000000.color.png", "frame-000001.color.jpg", "frame-000002.color.png"]
    rows = read_rows(tmp_path / "7scenes_all_scenes.csv")
    assert [row[3] for row in rows] == [f"chess/seq-01/{name}" for name in names]
    (sequence / "frame-000001.pose.txt").unlink()
    assert "frame-000001.color.jpg: an image without" in error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path)


NOT_FINITE = {"nan": "nan nan nan nan\n" * 4, "infinite": "-inf -inf -inf -inf\n" * 4, "huge": TURN.format(x="1e300"),
              "old Windows": "-1.#IND00 1.#INF 1.#QNAN0 -1.#J\n" * 3 + "0 0 0 1\n", "Windows": "-nan(ind) 0 0 0\n" * 4}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_frames_whose_pose_is_not_finite_are_left_out_if_asked(kind, tmp_path):
    attic, chess = write_7scenes(tmp_path, "attic"), write_7scenes(tmp_path, "chess")
    bad = chess / "seq-01/frame-000001.pose.txt"
    bad.write_text(NOT_FINITE[kind])
    arguments = [prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels"]
    error = error_of(*arguments)
    assert f"{bad}: " in error and " in it; a pose must be finite numbers; --skip_bad_poses leaves out" in error
    assert not (tmp_path / "labels").exists()
    lines = call_well(*arguments, "--skip_bad_poses").splitlines()
    assert f"{chess}: 1 frames left out, whose pose is not finite: seq-01/frame-000001" in lines
    assert f"{attic}: 0 frames left out, whose pose is not finite" in lines
    rows = read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_train.csv")
    assert [(row[3], float(row[4])) for row in rows] == [("chess/seq-01/frame-000000.color.png", 10),
                                                         ("chess/seq-01/frame-000002.color.png", 12)]
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv")) == 3


def write_frames(sequence, n, pose):
    for i in range(3, n):
        (sequence / f"frame-{i:06d}.color.png").write_bytes(b"")
        (sequence / f"frame-{i:06d}.pose.txt").write_text(pose)


def test_what_is_left_out_is_counted_and_five_are_named(tmp_path):
    chess = write_7scenes(tmp_path)
    write_frames(chess / "seq-01", 10, NOT_FINITE["nan"])
    output = call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    names = ", ".join(f"seq-01/frame-{i:06d}" for i in range(3, 8))
    assert f"{chess}: 7 frames left out, whose pose is not finite: {names}, ...\n" in output


@pytest.mark.parametrize("case, words", (
    ("all", "chess/seq-01: no frame is left; none of its 3 poses is finite"),
    ("three rows", "frame-000001.pose.txt: 3 rows with 12 numbers"),
    ("a word", "frame-000001.pose.txt: not a matrix of numbers"),
    ("mirrored", "frame-000001.pose.txt: no rotation"),
))
def test_poses_that_are_bad_in_another_way_stay_errors(case, words, tmp_path):
    sequence = write_7scenes(tmp_path) / "seq-01"
    nan = NOT_FINITE["nan"]
    text = {"all": nan, "three rows": nan[:48], "a word": nan.replace("nan", "left", 1),
            "mirrored": TURN.format(x=1).replace("-1", "1")}[case]
    for i in range(3) if case == "all" else [1]:
        (sequence / f"frame-{i:06d}.pose.txt").write_text(text)
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    assert words in error and "--skip_bad_poses" not in error and not (tmp_path / "labels").exists()


def test_cambridge_has_no_poses_to_skip(tmp_path):
    status, _, errors = run_module_here(prepare_cambridge, tmp_path, "--skip_bad_poses")
    assert status == 2 and "unrecognized arguments: --skip_bad_poses" in errors


def test_cambridge_label_files_copy_the_numbers_in_the_frames_order(tmp_path):
    lines = {scene: write_cambridge(tmp_path, scene) for scene in ("ShopFacade", "GreatCourt", "KingsCollege")}
    (tmp_path / "ShopFacade/seq2/frame00009.png").write_bytes(b"")
    output = call_well(prepare_cambridge, tmp_path, "--labels_path", tmp_path)
    for scene in lines:
        for split in ("train", "test"):
            rows = read_rows(tmp_path / f"abs_cambridge_pose_sorted.csv_{scene}_{split}.csv")
            order = ["seq2", "seq10"] if split == "train" else ["seq3"]
            assert [row[2:4] for row in rows] == [[seq, f"{scene}/{seq}/frame{i:05d}.png"] for seq in order for i in (1, 2)]
            assert {" ".join([row[3].removeprefix(f"{scene}/"), *row[4:]]) for row in rows} == set(lines[scene][split])
            assert {(row[0], row[1]) for row in rows} == {(scene, split)}
    assert len(read_labels(tmp_path / "cambridge_four_scenes.csv")) == 8
    together = read_rows(tmp_path / "cambridge_four_scenes.csv")
    assert [row[0] for row in together] == ["KingsCollege"] * 4 + ["ShopFacade"] * 4
    assert {row[1] for row in together} == {"train"}
    assert "ShopFacade: 1 images without a pose" in output and "seq2/frame00009.png" in output
    assert "cambridge_four_scenes.csv has KingsCollege, ShopFacade, not" in output


# COLMAP

NAMES = [f"seq{sequence}/frame{i}.png" for sequence in (1, 2, 10) for i in range(1, 13)]


def write_model(folder, text, names=NAMES):
    """A COLMAP model with random poses, and an image that is not registered; returns {name: (centre, quaternion)}."""
    import pycolmap
    random = np.random.default_rng(1)
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera(camera_id=1, model="PINHOLE", width=64, height=48, params=[50, 50, 32, 24])
    model.add_camera_with_trivial_rig(camera)
    poses = {}
    for i, name in enumerate(names, start=1):
        quaternion = random.standard_normal(4)
        w, x, y, z = quaternion = quaternion / np.linalg.norm(quaternion)
        translation = random.standard_normal(3)
        model.add_image_with_trivial_frame(pycolmap.Image(name=name, camera_id=1, image_id=i),
                                           pycolmap.Rigid3d(pycolmap.Rotation3d([x, y, z, w]), translation))
        rotation = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                             [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                             [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])
        poses[name] = -rotation.T @ translation, quaternion * [1, -1, -1, -1] * np.sign(w)
    model.add_image_with_trivial_frame(pycolmap.Image(name="seq1/dark.png", camera_id=1, image_id=len(names) + 1))
    folder.mkdir(parents=True)
    (model.write_text if text else model.write_binary)(folder)
    return poses


@pytest.mark.parametrize("text, old", ((True, False), (False, False), (False, True)))
def test_a_colmap_model_gives_back_its_poses(text, old, tmp_path):
    poses = write_model(tmp_path / "model", text)
    if old:  # before COLMAP 3.12, models had neither rigs nor frames
        (tmp_path / "model/rigs.bin").unlink()
        (tmp_path / "model/frames.bin").unlink()
    call_well(prepare_colmap, tmp_path / "model", tmp_path / "attic")
    rows = {split: read_rows(tmp_path / f"attic/attic_{split}.csv") for split in ("train", "test")}
    assert [row[3] for row in rows["test"]] == ["seq1/frame8.png", "seq2/frame8.png", "seq10/frame8.png"]
    assert [row[3] for row in rows["train"]] == [name for name in NAMES if not name.endswith("frame8.png")]
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


ODD_NAMES = ["walk one/view 0.jpg", "walk one/view  1.jpg", "walk/#2.jpg", "walk/3 4 5 6", "17", "Mühle/18 19 20"]
POINTS = ["1 2 -1 3 4.5 -1 1e2 3 7", "", "1.5 2e-1 -1 ", "1 2 -1 3 4 -1 1 3 -1 7 8 12", "1 0 0 -1 5 -1", ""]


def image_lines(folder):
    """The header of images.txt as text, and its lines of images."""
    lines = (folder / "images.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("#")), [
        line for line in lines if line and not line.startswith("#")]


TEXTS = {
    "as written": lambda head, images: head + "".join(f"{image}\n\n" for image in images),
    "points": lambda head, images: head + "".join(f"{image}\n{line}\n" for image, line in zip(images, POINTS)),
    "no empty lines": lambda head, images: head + "".join(f"{image}\n" for image in images),
    "points, no empty lines": lambda head, images: head + "".join(
        f"{image}\n{line}\n" if line else f"{image}\n" for image, line in zip(images, POINTS)),
    "one line missing": lambda head, images: head + "\n\n".join(images).replace("\n\n", "\n", 1),
    "the last line missing": lambda head, images: head + "\n\n".join(images),
    "Windows": lambda head, images: "\ufeff" + (head + "\n\n".join(images)).replace("\n", "\r\n"),
    "tabs": lambda head, images: head + "".join("\t".join(image.split(" ", 9)) + "\n\n" for image in images),
    "spaces": lambda head, images: head + "".join("  ".join(image.split(" ", 9)) + "  \n  \n" for image in images),
    "comments": lambda head, images: head + "".join(f"{image}\n# a comment\n\n" for image in images),
    "no header": lambda head, images: "".join(f"{image}\n\n" for image in images),
}


@pytest.mark.parametrize("case", TEXTS)
def test_every_image_of_a_text_model_is_read_with_its_whole_name(case, tmp_path):
    poses = write_model(tmp_path / "model", True, ODD_NAMES)
    text = TEXTS[case](*image_lines(tmp_path / "model"))
    (tmp_path / "model/images.txt").write_bytes(text.encode())
    frames = dict(prepare_colmap.read_model(tmp_path / "model"))
    assert set(frames) == set(ODD_NAMES)
    for name in poses:
        np.testing.assert_allclose(frames[name], np.concatenate(poses[name]), atol=1e-12)
    write_model(tmp_path / "binary", False, ODD_NAMES)
    assert dict(prepare_colmap.read_model(tmp_path / "binary")).keys() == frames.keys()


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


TEXT_MISTAKES = {
    "another number": (lambda text: text.replace("images: 6", "images: 7"),
                       "images.txt: 6 images, but its header says 7"),
    "an id twice": (lambda text: text.replace("\n2 ", "\n1 "),
                    "images.txt: line 7: image id 1 is listed in line 5 already"),
    "no name": (lambda text: text.replace(" walk/#2.jpg", ""), "images.txt: line 9: '3 -0.58"),
    "cut off": (lambda text: text[:text.index("walk/#2") - 60], "images.txt: line 9: '3 -0.58"),
    "cut in the name": (lambda text: text[:text.index("/#2")], "images.txt: 3 images, but its header says 6"),
    "half a point": (lambda text: text.replace("0.jpg\n", "0.jpg\n1.5 2"),
                     "images.txt: line 6: '1.5 2' is neither an image"),
    "half a point, whole numbers": (lambda text: text.replace("0.jpg\n", "0.jpg\n1 2 -1 3 4 -1 5 6 7 8 9"),
                                    "images.txt: line 6: '1 2 -1 3 4 -1 5 6 7 8 9' is neither an image"),
    "points behind an empty line": (lambda text: text.replace("0.jpg\n", "0.jpg\n\n1 2 -1 3 4 -1 5 6 7 8 9 8\n"),
                                    "images.txt: line 7: '1 2 -1 "),
    "nan": (lambda text: re.sub("\n3 [^ ]* ", "\n3 nan ", text), "image walk/#2.jpg has no finite pose"),
    "no rotation": (lambda text: re.sub("\n3( [^ ]*){4} ", "\n3 0 0 0 0 ", text),
                    "image walk/#2.jpg has no finite pose"),
    "a number of Python's": (lambda text: re.sub("\n3 [^ ]* ", "\n3 0_1 ", text), "images.txt: line 9: '3 0_1 "),
    "Latin-1": (lambda text: text.encode("latin-1"), "images.txt: not a text file in UTF-8"),
}


@pytest.mark.parametrize("case", TEXT_MISTAKES)
def test_a_damaged_images_txt_ends_in_one_clear_line(case, tmp_path):
    write_model(tmp_path / "model", True, ODD_NAMES)
    path = tmp_path / "model/images.txt"
    broken = TEXT_MISTAKES[case][0](path.read_text(encoding="utf-8"))
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    assert TEXT_MISTAKES[case][1] in error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("name", ("cameras", "points3D", "frames"))
def test_another_damaged_file_of_a_text_model_ends_in_one_clear_line(name, tmp_path):
    write_model(tmp_path / "model", True)
    path = tmp_path / f"model/{name}.txt"
    path.write_text(path.read_text() + "1 left\n")
    error = error_of(prepare_colmap, tmp_path / "model", tmp_path / "labels")
    assert f"{tmp_path / 'model'}: not a readable COLMAP model" in error and not (tmp_path / "labels").exists()


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


def remove_files(folder):
    for path in folder.glob("*.*"):
        path.unlink()


def truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


COLMAP_MISTAKES = {
    "no model": (lambda model: shutil.rmtree(model), [], "model: no COLMAP model"),
    "a folder above": (lambda model: shutil.copytree(model, model / "0") and remove_files(model), [], "such as sparse/0"),
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


# Mistakes in what is on disk

def edit(name, old, new):
    def edit_file(scene):
        assert old in (scene / name).read_text()
        (scene / name).write_text((scene / name).read_text().replace(old, new, 1))
    return edit_file


def remove(name):
    return lambda scene: (scene / name).unlink()


def empty(folder):
    def empty_folder(scene):
        shutil.rmtree(scene / folder)
        (scene / folder).mkdir()
    return empty_folder


def empty_dataset(scene):
    shutil.rmtree(scene.parent)
    scene.parent.mkdir()


POSE = "seq-02/frame-000001.pose.txt"
def cut_archive(share):
    def break_it(scene):
        path = write_archive(scene.parent / "fire.zip", scene)
        truncate(path, int(share * path.stat().st_size))
    return break_it


SEVEN_SCENES_MISTAKES = {
    "no split file": (remove("TestSplit.txt"), "chess/TestSplit.txt: cannot be read: No such file"),
    "empty split file": (edit("TestSplit.txt", "sequence2", ""), "chess/TestSplit.txt: names no sequence"),
    "split of something else": (edit("TestSplit.txt", "sequence2", "frames 2"),
                                "TestSplit.txt: line 1: 'frames 2' is no sequence"),
    "sequence not there": (edit("TestSplit.txt", "sequence2", "sequence2\nsequence 7"),
                           "TestSplit.txt: line 2: there is no folder "),
    "sequence in both splits": (edit("TestSplit.txt", "sequence2", "sequence1"),
                                "TestSplit.txt: line 1: seq-01 is named in "),
    "three rows": (edit(POSE, "0 0 0 1\n", ""), f"{POSE}: 3 rows"),
    "five numbers in a row": (edit(POSE, "1 0 0 2", "1 0 0 2 1"), f"{POSE}: 4 rows with 17 numbers"),
    "empty pose": (lambda scene: (scene / POSE).write_text(""), f"{POSE}: 0 rows"),
    "NaN": (edit(POSE, "-1", "nan"), f"{POSE}: nan in it"),
    "infinite position": (edit(POSE, " 2\n", " -inf\n"), f"{POSE}: -inf in it"),
    "a word": (edit(POSE, "-1", "left"), f"{POSE}: not a matrix of numbers"),
    "a number of Python's": (edit(POSE, "-1", "-1_0"), f"{POSE}: not a matrix of numbers: could not convert"),
    "mirrored": (edit(POSE, "-1", "1"), f"{POSE}: no rotation and translation"),
    "scaled": (edit(POSE, "-1", "-1.2"), f"{POSE}: no rotation and translation"),
    "transposed": (lambda scene: (scene / POSE).write_text("0 1 0 0\n-1 0 0 0\n0 0 1 0\n4 2 3 1\n"), f"{POSE}: no rotation"),
    "binary pose": (lambda scene: (scene / POSE).write_bytes(b"\xff\xfe\x00"), f"{POSE}: not a text file"),
    "image without pose": (remove(POSE), "frame-000001.color.png: an image without its pose, frame-000001.pose.txt"),
    "pose without image": (remove("seq-02/frame-000001.color.png"), f"{POSE}: a pose without its image"),
    "empty sequence": (empty("seq-02"), "chess/seq-02: no frame-"),
    "empty dataset": (empty_dataset, "no scene in it"),
    "no dataset": (lambda scene: shutil.rmtree(scene.parent), "no such folder"),
    "truncated archive of a sequence": (lambda scene: (scene / "seq-03.zip").write_bytes(b"PK\3\4 and no more"),
                                        "chess/seq-03.zip: a truncated or damaged archive"),
    **{f"archive of a scene cut off at {share}": (cut_archive(share), "fire.zip: a truncated or damaged archive")
       for share in (0.3, 0.5, 0.75, 0.99, 0.999)},
    "archive of another scene": (lambda scene: write_archive(scene.parent / "fire.zip", scene),
                                 "fire.zip: holds no folder fire"),
}
CAMBRIDGE_MISTAKES = {
    "no split file": (remove("dataset_train.txt"), "ShopFacade/dataset_train.txt: cannot be read: No such file"),
    "image not there": (remove("seq3/frame00001.png"), "dataset_test.txt: line 5: image "),
    "image in both splits": (edit("dataset_test.txt", "seq3/frame00001.png", "seq2/frame00001.png"),
                             "dataset_test.txt: image seq2/frame00001.png is listed in "),
    "image outside": (edit("dataset_test.txt", "seq3/", "../seq3/"), "dataset_test.txt: line 4: image ../seq3"),
    "seven fields": (edit("dataset_test.txt", "seq3/frame00002.png", ""), "dataset_test.txt: line 4: '"),
    "nine fields": (edit("dataset_test.txt", "frame00002.png", "frame00002.png 1"), "dataset_test.txt: line 4: '"),
    "NaN": (edit("dataset_test.txt", "frame00001.png ", "frame00001.png nan"), "dataset_test.txt: line 5: '"),
    "a number of Python's": (edit("dataset_test.txt", "frame00001.png ", "frame00001.png 1_"),
                             "dataset_test.txt: line 5: '"),
    "no header": (edit("dataset_test.txt", "Visual Landmark Dataset V1\n", ""),
                  "dataset_test.txt: line 3: a frame among the 3"),
    "no frames": (lambda scene: (scene / "dataset_test.txt").write_text("a\nb\n\n"), "dataset_test.txt: lists no frame"),
    "empty dataset": (empty_dataset, "no scene in it"),
}


@pytest.mark.parametrize("module, write, case",
                         [(prepare_7scenes, write_7scenes, case) for case in SEVEN_SCENES_MISTAKES]
                         + [(prepare_cambridge, write_cambridge, case) for case in CAMBRIDGE_MISTAKES])
def test_a_mistake_ends_in_one_clear_line_and_no_label_file(module, write, case, tmp_path):
    cases = SEVEN_SCENES_MISTAKES if module is prepare_7scenes else CAMBRIDGE_MISTAKES
    break_it, words = cases[case]
    scene = "chess" if module is prepare_7scenes else "ShopFacade"
    write(tmp_path / "data", scene)
    write(tmp_path / "data", "Attic")  # prepared before the other, and nothing wrong with it
    break_it(tmp_path / "data" / scene)
    assert words in error_of(module, tmp_path / "data", "--labels_path", tmp_path / "labels")
    assert not (tmp_path / "labels").exists() and not list(tmp_path.rglob("*.part"))


def test_first_five():
    assert first_five(["a"]) == "a" and first_five(["a", "b"]) == "2 problems: a; b"
    assert first_five(list("abcde")) == "5 problems: a; b; c; d; e"
    assert first_five(list("abcdefgh")) == "8 problems: a; b; c; d; e; and 3 more"


def test_several_bad_poses_of_a_scene_are_counted(tmp_path):
    chess = write_7scenes(tmp_path)
    write_frames(chess / "seq-01", 8, NOT_FINITE["nan"])
    (chess / "seq-02/frame-000001.pose.txt").unlink()
    (chess / "seq-02/frame-000002.color.png").unlink()
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert f"error: 7 problems: {chess}/seq-01/frame-000003.pose.txt: nan in it; a pose must be finite" in error
    assert "frame-000007" in error and "seq-02" not in error
    assert error.endswith("; and 2 more; --skip_bad_poses leaves out the frames whose pose is not finite\n")
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    assert "error: 2 problems: " in error and "frame-000002.pose.txt: a pose without its image" in error
    assert "frame-000001.color.png: an image without its pose" in error and "--skip" not in error
    assert not (tmp_path / "labels").exists()


def test_several_bad_lines_of_a_split_file_are_counted(tmp_path):
    write_cambridge(tmp_path)
    path = tmp_path / "ShopFacade/dataset_train.txt"
    text = path.read_text()
    path.write_text(text.replace("seq10/frame00001", "/seq10/frame00001").replace(".png ", ".jpg ") + "# end\n" * 3)
    error = error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels")
    assert f"error: {path}: 7 problems: line 4: image {path.parent}/seq10/frame00002.jpg does not exist; " in error
    assert "line 5: image /seq10/frame00001.jpg is outside" in error and "line 8: '# end' is no frame" in error
    assert "line 9" not in error and error.endswith("; and 2 more\n")
    path.write_text(text + "".join(f"{line}\n" for line in text.splitlines()[3:5]))
    error = error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels")
    assert "error: 2 problems: " in error and error.count("already; list each once") == 2
    assert not (tmp_path / "labels").exists()


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_process_ends_with_2_and_one_line(tmp_path):
    scene = write_7scenes(tmp_path)
    edit(POSE, "-1", "nan")(scene)
    process = run_script("-m", "datasets.prepare_7scenes", tmp_path, "--labels_path", tmp_path / "labels")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and POSE in process.stderr
    assert process.stderr.startswith("prepare_7scenes.py: error: ")


def test_arguments_that_do_not_go_together(tmp_path):
    write_cambridge(tmp_path)
    for more, words in ((["--url", "http://localhost"], "--url is for --download"),
                        (["--download", "--url", "ftp://localhost"], "must begin with http://"),
                        (["--download", "--scenes", "Attic"], "--scenes Attic: no scene to download; choose from Kings"),
                        (["--scenes", "../ShopFacade"], "give a folder's name, not a path"),
                        (["--scenes", "ShopFacade", "Street"], "--scenes Street: no such folder")):
        assert words in error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels", *more)
    assert not (tmp_path / "labels").exists()


# Archives

def test_archives_downloaded_by_hand_are_unpacked_and_kept(tmp_path):
    chess = write_7scenes(tmp_path / "source")
    archive = write_archive(tmp_path / "chess.zip", chess)
    (tmp_path / "chess.part" / "chess").mkdir(parents=True)
    (tmp_path / "chess.part" / "chess" / "seq-09.zip").write_bytes(b"PK")  # what an interrupted run left
    shutil.copytree(chess, tmp_path / "fire")
    write_archive(tmp_path / "inner.zip", chess)
    with zipfile.ZipFile(tmp_path / "inner.zip") as file:
        (tmp_path / "fire" / "seq-02.zip").write_bytes(file.read("chess/seq-02.zip"))
    shutil.rmtree(tmp_path / "fire" / "seq-02")
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert listing_below(tmp_path / "chess") == listing_below(chess)
    assert archive.exists() and (tmp_path / "fire" / "seq-02.zip").exists() and not (tmp_path / "chess.part").exists()
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_fire_test.csv")) == 3


def listing_below(folder):
    return {path.relative_to(folder): contents for path, contents in listing(folder).items()}


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


HOSTILE = ["../evil.txt", "/evil.txt", "chess/../../evil.txt", "chess\\..\\..\\evil.txt", "C:/evil.txt", "c:evil.txt",
           link("chess/evil.txt")]


@pytest.mark.parametrize("within", (False, True))
@pytest.mark.parametrize("member", HOSTILE, ids=lambda member: getattr(member, "filename", member))
def test_a_member_outside_the_folder_is_refused(member, within, tmp_path):
    chess = write_7scenes(tmp_path / "source")
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    archive = write_archive(root / "chess.zip", chess)
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile if within else archive, "a") as file:
        file.writestr("seq-03/frame-000000.color.png", "")
        file.writestr(member, "../../somewhere")
    if within:
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("chess/seq-03.zip", hostile.getvalue())
    before = listing(tmp_path)
    error = error_of(prepare_7scenes, root, "--labels_path", tmp_path / "labels")
    assert "chess.zip: " in error and "evil.txt" in error and ("link" in error or "outside the folder" in error)
    assert listing(tmp_path) == before and not os.path.exists("/evil.txt") and not (root / "chess").exists()


@pytest.mark.parametrize("within", (False, True))
def test_a_damaged_archive_is_named_and_nothing_is_left_of_it(within, tmp_path):
    archive = write_archive(tmp_path / "chess.zip", write_7scenes(tmp_path / "source"))
    if within:
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("chess/seq-03.zip", b"PK\3\4")
    else:
        contents = bytearray(archive.read_bytes())
        contents[3000] ^= 1  # the archive has all its members, and one is wrong
        archive.write_bytes(contents)
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert "chess.zip: " in error and "truncated or damaged" in error and "delete" in error
    assert ("seq-03.zip" in error) == within
    assert {path.name for path in tmp_path.iterdir()} == {"chess.zip", "source"}


def run_without_space(limit, *arguments):
    """Run a module in a process that can write no file beyond `limit` bytes, as on a disk that is full."""
    return subprocess.run([sys.executable, "-B", "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                          env={**os.environ, "no_proxy": "*"}, stdin=subprocess.DEVNULL)


def test_no_space_while_unpacking(tmp_path):
    write_archive(tmp_path / "chess.zip", write_7scenes(tmp_path / "source"))
    process = run_without_space(1000, "datasets.prepare_7scenes", tmp_path, "--labels_path", tmp_path / "labels")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "chess.zip: cannot be unpacked to " in process.stderr and "File too large" in process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"chess.zip", "source"}


# Downloading

@pytest.fixture
def server(monkeypatch):
    """A server of `files`, {path: bytes}, that notes `requests`, (path, Range or None), and misbehaves by `fault`:
    None, 'no ranges', 'drops' (in the middle of what is left), 'resets' (the first connection), 'truncates' (at the same
    place each time), 'page'."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            files, fault = self.server.files, self.server.fault
            asked = self.headers["Range"]
            self.server.requests.append((self.path, asked))
            if self.path not in files:
                return self.send_error(404)
            body = files[self.path]
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and fault not in ("no ranges", "truncates") else 0
            if first and first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - first))
            self.send_header("Content-Type", "text/html" if fault == "page" else "application/zip")
            self.end_headers()
            rest = body[first:]
            if fault == "drops" and len(rest) > 4000 or fault == "truncates":
                rest = rest[:len(rest) // 2]
            if fault == "resets" and len(self.server.requests) == 1:
                rest = rest[:len(rest) // 2]
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.write(rest)
            return None

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "WAITS", (0, 0, 0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests, running.fault = {}, [], None
        running.url = f"http://127.0.0.1:{running.server_port}/base"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def chess(server, tmp_path):
    """The archive of the scene chess, which the server has."""
    archive = write_archive(tmp_path / "served.zip", write_7scenes(tmp_path / "source"))
    server.files["/base/chess.zip"] = archive.read_bytes()
    return archive.read_bytes()


def chess_from(server, tmp_path, more=("--yes",)):
    return [prepare_7scenes, tmp_path / "data", "--labels_path", tmp_path / "labels", "--download", "--url", server.url,
            "--scenes", "chess", *more]


@pytest.mark.parametrize("fault", (None, "no ranges", "drops", "resets"))
def test_a_scene_is_downloaded_whatever_the_connection(fault, server, chess, tmp_path):
    server.fault = fault
    output = call_well(*chess_from(server, tmp_path))
    assert prepare_7scenes.LICENCE in output
    assert listing_below(tmp_path / "data" / "chess") == listing_below(tmp_path / "source" / "chess")
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_train.csv")) == 3
    if fault == "drops":  # each request asks for what is missing, and for no more
        expected, have = [("/base/chess.zip", None)], 0
        while len(chess) - have > 4000:
            have += (len(chess) - have) // 2
            expected.append(("/base/chess.zip", f"bytes={have}-"))
        assert server.requests == expected and len(expected) > 2
    else:
        assert server.requests[0] == ("/base/chess.zip", None) and len(server.requests) == 1 + (fault == "resets")

    server.requests.clear()
    shutil.rmtree(tmp_path / "labels")
    call_well(*chess_from(server, tmp_path, more=()))  # nothing to fetch: nothing to agree to
    assert server.requests == [] and (tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv").exists()


@pytest.mark.parametrize("have, fault, asked", ((5000, None, ["bytes=5000-"]),
                                                (5000, "no ranges", ["bytes=5000-"]),
                                                ("all", None, ["bytes={}-"]),
                                                ("more", None, ["bytes={}-", None])))
def test_an_interrupted_file_is_resumed(have, fault, asked, server, chess, tmp_path):
    server.fault = fault
    left = {"all": chess, "more": chess + b"of another file"}.get(have) or chess[:have]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chess.zip.part").write_bytes(left)
    call_well(*chess_from(server, tmp_path))
    assert [range_ for _, range_ in server.requests] == [a and a.format(len(left)) for a in asked]
    assert (tmp_path / "data" / "chess.zip").read_bytes() == chess
    assert not (tmp_path / "data" / "chess.zip.part").exists()


@pytest.mark.parametrize("fault, n_requests, words", (
    ("absent", 1, "/base/chess.zip: the server answers 404"),
    ("page", 1, "/base/chess.zip: a web page, not an archive"),
    ("truncates", 4, "/base/chess.zip: the download does not get on: the connection ended after "),
    ("damaged", 1, "chess.zip: a truncated or damaged archive"),
))
def test_a_download_that_cannot_be_had(fault, n_requests, words, server, chess, tmp_path):
    if fault == "absent":
        server.files.clear()
    elif fault == "damaged":
        server.files["/base/chess.zip"] = chess[:5000]
    server.fault = fault
    assert words in error_of(*chess_from(server, tmp_path))
    assert len(server.requests) == n_requests
    assert not (tmp_path / "labels").exists() and not (tmp_path / "data" / "chess").exists()
    assert (tmp_path / "data" / "chess.zip").exists() == (fault == "damaged")


def test_a_server_that_is_not_there(server, tmp_path):
    server.url = "http://127.0.0.1:1"
    assert "http://127.0.0.1:1/chess.zip: the download does not get on: " in error_of(*chess_from(server, tmp_path))
    server.url = "http://127.0.0.1:port"
    assert "not a usable address" in error_of(*chess_from(server, tmp_path))


def test_cambridge_is_fetched_from_the_addresses_of_its_scenes(server, tmp_path):
    numbers = {"KingsCollege": 251342, "OldHospital": 251340, "ShopFacade": 251336, "StMarysChurch": 251294,
               "GreatCourt": 251291}
    for scene, number in numbers.items():
        write_cambridge(tmp_path / "source", scene)
        archive = shutil.make_archive(tmp_path / "served", "zip", tmp_path / "source", scene)
        server.files[f"/base/{number}/{scene}.zip"] = Path(archive).read_bytes()
    output = call_well(prepare_cambridge, tmp_path / "data", "--labels_path", tmp_path / "labels", "--download", "--yes",
                       "--url", f"{server.url}/")
    assert {path for path, _ in server.requests} == set(server.files) and len(server.requests) == 5
    assert prepare_cambridge.LICENCE in output and "without" not in output
    assert len(list((tmp_path / "labels").iterdir())) == 11
    assert {row[0] for row in read_rows(tmp_path / "labels/cambridge_four_scenes.csv")} == set(numbers) - {"GreatCourt"}


def test_no_space_while_downloading(server, chess, tmp_path):
    module, *arguments = chess_from(server, tmp_path)
    process = run_without_space(4096, "datasets.prepare_7scenes", *arguments)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "chess.zip.part: cannot be written: File too large" in process.stderr and len(server.requests) == 1
    call_well(module, *arguments)  # with more space it goes on
    assert server.requests[1:] == [("/base/chess.zip", "bytes=4096-")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_licence_is_asked_about_once(server, chess, tmp_path, monkeypatch):
    assert "add --yes" in error_of(*chess_from(server, tmp_path, more=()))  # there is no terminal here
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert "unless you agree" in error_of(*chess_from(server, tmp_path, more=()))
    assert server.requests == [] and not (tmp_path / "data").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    output = call_well(*chess_from(server, tmp_path, more=()))
    assert output.count("[y/N]") == 1 and prepare_7scenes.LICENCE in output and len(server.requests) == 1
