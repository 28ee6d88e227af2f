"""Rendered scenes: frames show what their labels say, and the paths are as promised."""
import re

import numpy as np
import pandas as pd
import pytest
from conftest import run_module_here, run_script
from PIL import Image
from transforms3d.quaternions import quat2mat

from datasets import export_poses, prepare_7scenes, prepare_cambridge
from datasets.official import CAMBRIDGE, SEVEN_SCENES
from datasets.synthetic_scenes import UP, Box, Face, Scene, camera_rotation, make_room, make_yard, render, write_scene
from datasets.synthetic_scenes import __main__ as synthetic_scenes
from datasets.synthetic_scenes.paths import train_and_test_paths
from datasets.synthetic_scenes.rooms import make_excursion

WIDTH, HEIGHT, FOCAL = 320, 240, 292.5


def one_colour(colour):
    return lambda w, h: np.full((8, 8, 3), colour, float)


def in_full_light(faces):
    for face in faces:
        face.light(np.ones((2, 2, 3)))
    return faces


@pytest.mark.parametrize("layout, module, dataset", [("7Scenes", prepare_7scenes, SEVEN_SCENES),
                                                     ("cambridge", prepare_cambridge, CAMBRIDGE)])
def test_a_known_point_is_seen_where_the_label_projects_it(tmp_path, layout, module, dataset):
    """A small magenta cube in a grey room is found in the frames, written and labelled by the real code.

    The projection is the textbook's: x = R (X - c), u = f x/z + w/2.
    """
    point = np.array([0.3, -0.2, 1.5])
    cube = Box(point, (0.04, 0.04, 0.04))
    floor = Face(np.zeros(3), UP, np.array([0, 1.0, 0]), (6, 6), one_colour((128, 128, 128))(6, 6))
    scene = Scene(in_full_light([floor, *cube.faces(one_colour((255, 0, 255)), bottom=True)]), [cube],
                  ((-2, -2, 1), (2, 2, 2)), ((-0.8, -0.8, 1.2), (1, 0.8, 1.8)))
    write_scene(tmp_path / "data" / "cube", scene, layout, 20, WIDTH, np.random.default_rng(0))
    assert run_module_here(module, tmp_path / "data", "--labels_path", tmp_path)[0] == 0

    to_camera = {}  # what datasets.export_poses writes for the visual localisation benchmark
    label_files = [tmp_path / dataset.label_file("cube", split) for split in ("train", "test")]
    for path in label_files:
        assert not run_module_here(export_poses, path, tmp_path / "visloc.txt", "--format", "visloc",
                                   "--name_parts", "9", "--convention", dataset.name)[0]
        to_camera |= {line.split()[0]: line for line in (tmp_path / "visloc.txt").read_text().splitlines()}
    compared = 0
    for _, label in pd.concat([pd.read_csv(path) for path in label_files]).iterrows():
        rotation = quat2mat(label[["q1", "q2", "q3", "q4"]].to_numpy(float))
        to_point = point - label[["t1", "t2", "t3"]].to_numpy(float)
        x, y, z = (rotation if layout == "cambridge" else rotation.T) @ to_point
        name, *pose = to_camera[label["img_path"]].split()
        pose = np.array(pose, float)
        assert np.allclose(quat2mat(pose[:4]) @ point + pose[4:], (x, y, z), atol=1e-5)
        column, row = FOCAL * x / z + WIDTH / 2, FOCAL * y / z + HEIGHT / 2
        pixels = np.asarray(Image.open(tmp_path / "data" / label["img_path"])).astype(int)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 50))
        in_view = z > 0.8 and 15 < column < WIDTH - 15 and 15 < row < HEIGHT - 15
        if z > 0.8 and not (-15 < column < WIDTH + 15 and -15 < row < HEIGHT + 15):
            assert not len(rows)
        if in_view:
            assert np.hypot(columns.mean() + 0.5 - column, rows.mean() + 0.5 - row) < 1
            compared += 1
    assert compared > 20


def test_what_is_nearest_is_seen():
    """Boxes of one colour each, against ray casting in double precision with the slab method."""
    random = np.random.default_rng(1)
    boxes = [(random.uniform(-2, 2, 3), random.uniform(0.2, 1.2, 3), random.uniform(-3, 3)) for _ in range(12)]
    colours = [np.array([20 * i + 10, 255 - 20 * i, 7 * i]) for i in range(len(boxes))]
    faces = in_full_light([face for box, colour in zip(boxes, colours, strict=True)
                           for face in Box(*box).faces(one_colour(colour), bottom=True)])
    position, rotation = np.array([-5.0, 0.5, 0.7]), camera_rotation(np.array([5, -0.4, -0.6]), 12)
    image = render(faces, position, rotation, WIDTH, HEIGHT)

    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    rays = np.stack(((columns - WIDTH / 2) / FOCAL, (rows - HEIGHT / 2) / FOCAL, np.ones_like(rows)), axis=-1)
    rays = rays @ rotation.T
    nearest, expected = np.full((HEIGHT, WIDTH), np.inf), np.zeros((HEIGHT, WIDTH, 3))
    for (centre, size, yaw), colour in zip(boxes, colours, strict=True):
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        start, steps = (position - centre) @ turn, rays @ turn
        ends = np.sort([(-size / 2 - start) / steps, (size / 2 - start) / steps], axis=0)
        enter, leave = ends[0].max(axis=-1), ends[1].min(axis=-1)
        hit = (enter < leave) & (enter > 0) & (enter < nearest)
        nearest[hit], expected[hit] = enter[hit], colour
    same = (np.abs(image - expected) <= 1).all(axis=-1)
    assert np.isfinite(nearest).mean() > 0.15 and len(np.unique(expected.reshape(-1, 3), axis=0)) > 6
    assert same.mean() > 0.9995  # rounding decides at a silhouette


@pytest.mark.parametrize("make", [make_room, make_yard])
def test_a_camera_in_a_scene_sees_no_gap_and_much_detail(make):
    scene = make(np.random.default_rng(3))
    middle = np.mean(scene.cameras, axis=0)
    for yaw in np.radians(range(0, 360, 45)):
        rotation = camera_rotation(np.array([np.cos(yaw), np.sin(yaw), -0.2]), 3)
        image = render(scene.faces, middle, rotation, WIDTH, HEIGHT)
        assert (image.max(axis=-1) > 0).mean() > 0.999  # black is where no face is
        assert image.std(axis=(0, 1)).mean() > 15


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_a_seed_determines_a_scene(tmp_path):
    small = "--scenes", "room", "--frames", 5, "--width", 32
    process = run_script("-m", "datasets.synthetic_scenes", tmp_path / "one", *small)
    assert process.returncode == 0, process.stderr
    for folder, seed in (("again", 0), ("other", 1)):
        status, _, errors = run_module_here(synthetic_scenes, tmp_path / folder, *small, "--seed", seed)
        assert status == 0, errors
    assert len(contents(tmp_path / "one")) == 2 * 35 + 2
    assert contents(tmp_path / "one") == contents(tmp_path / "again") != contents(tmp_path / "other")


def test_paths_are_smooth_and_the_test_path_keeps_its_distance(tmp_path):
    status, output, errors = run_module_here(synthetic_scenes, tmp_path / "one", "--scenes", "room", "--frames", 60,
                                             "--width", 32)
    assert status == 0, errors
    assert len(contents(tmp_path / "one")) == 2 * 420 + 2
    assert run_module_here(prepare_7scenes, tmp_path / "one", "--labels_path", tmp_path)[0] == 0
    train, test = (pd.read_csv(tmp_path / SEVEN_SCENES.label_file("room-1", split)) for split in ("train", "test"))
    assert (len(train), train["seq"].nunique(), len(test), test["seq"].nunique()) == (360, 6, 60, 1)
    position, quaternion = ["t1", "t2", "t3"], ["q1", "q2", "q3", "q4"]
    distances = np.linalg.norm(test[position].to_numpy()[:, None] - train[position].to_numpy(), axis=2)
    angles = np.degrees(2 * np.arccos(np.abs(test[quaternion].to_numpy() @ train[quaternion].to_numpy().T).clip(max=1)))
    assert ((distances >= 0.05) | (angles >= 2)).all()
    printed = re.search(r"a median of (\d+\.\d+) m from the nearest training position", output)
    assert float(printed[1]) == pytest.approx(np.median(distances.min(axis=1)), abs=0.006)
    for _, path in [*train.groupby("seq"), *test.groupby("seq")]:  # smooth
        steps = np.linalg.norm(np.diff(path[position].to_numpy(), axis=0), axis=1)
        assert 0 < steps.max() < 0.5 and np.abs(np.diff(steps)).max() < 0.15


def test_an_excursion_leaves_the_trained_part_half_of_the_time():
    scene = make_excursion(np.random.default_rng(3))
    *training, (positions, rotations) = train_and_test_paths(scene, 40, np.random.default_rng(4))[0]
    directions = rotations[:, :, 2]  # the optical axes
    of_training = np.concatenate([rotations[:, :, 2] for _, rotations in training])
    angles = np.degrees(np.arccos((directions @ of_training.T).clip(-1, 1))).min(axis=1)
    assert angles[:18].max() < 15 and angles[22:].min() > 30
    beyond = positions[:, 0] - max(positions[:, 0].max() for positions, _ in training)
    assert beyond[:18].max() < 0.1 and beyond[22:].max() > 0.3
    assert min(box.distance(positions).min() for box in scene.boxes) > 0.2
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    assert steps.max() < 0.8


@pytest.mark.parametrize("arguments, words", [
    (["there", "--scenes", "room"], ["there/room-1 exists already"]),
    (["new", "--frames", "1"], ["--frames 1: must be at least 2"]),
    (["new", "--width", "0"], ["--width 0: must be at least 32"]),
    (["file", "--frames", "2", "--width", "32"], ["file/room-1: cannot be written"]),
])
def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "room-1").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    status, _, error = run_module_here(synthetic_scenes, *arguments)
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in words)
    assert sorted(tmp_path.rglob("*")) == before
