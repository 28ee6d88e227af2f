"""What the tests of the prepare commands share: small layouts of the official downloads and of COLMAP models."""
import csv
import io
import os
import resource
import shutil
import subprocess
import sys
import zipfile

import numpy as np
from conftest import ROOT, run_module_here

# A quarter turn about z: the quaternion is (r, 0, 0, r), r = sqrt(1/2).
TURN = "0 -1 0 {x}\n1 0 0 2\n0 0 1 3\n0 0 0 1\n"


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
    """Write a scene as the official one, unpacked: seq-01 for training, seq-02 for testing. Returns its folder."""
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
    """Write a scene's folder as an archive like the official ones: each sequence is an archive within it."""
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
    """Write a scene as the official one. Returns the lines of its split files: {split: lines}."""
    random = np.random.default_rng(len(scene))
    lines = {"train": [], "test": []}
    for sequence, split in (("seq10", "train"), ("seq2", "train"), ("seq3", "test")):
        for i in (2, 1):
            image = root / scene / sequence / f"frame{i:05d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"")
            pose = (f"{x:.6f}" for x in random.standard_normal(7))
            lines[split].append(" ".join([f"{sequence}/{image.name}", *pose]))
    for split in lines:
        header = ["Visual Landmark Dataset V1", "ImageFile, Camera Position [X Y Z W P Q R]", ""]
        (root / scene / f"dataset_{split}.txt").write_text("\n".join([*header, *lines[split]]) + "\n")
    return lines


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


def pose_of(row):
    return np.array(row[4:], dtype=float)


NAMES = [f"seq{sequence}/frame{i}.png" for sequence in (1, 2, 10) for i in range(1, 13)]


def write_model(folder, text, names=NAMES):
    """Write a COLMAP model with random poses, and an image that is not registered.

    Returns {name: (centre, camera-to-world quaternion)}.
    """
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


def truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


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


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing_below(folder):
    return {path.relative_to(folder): contents for path, contents in listing(folder).items()}


def run_without_space(limit, *arguments):
    """Run a module in a process that can write no file beyond `limit` bytes, as on a disk that is full."""
    return subprocess.run([sys.executable, "-B", "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                          env={**os.environ, "no_proxy": "*"}, stdin=subprocess.DEVNULL)


def ends_in_one_clear_line(module, write, scene, mistake, tmp_path):
    """Assert that a mistake in a scene's data ends in one line, and in no label file.

    mistake: (a function that breaks the scene's folder, words of the line).
    """
    break_it, words = mistake
    write(tmp_path / "data", scene)
    write(tmp_path / "data", "Attic")  # prepared before the other, and nothing wrong with it
    break_it(tmp_path / "data" / scene)
    assert words in error_of(module, tmp_path / "data", "--labels_path", tmp_path / "labels")
    assert not (tmp_path / "labels").exists() and not list(tmp_path.rglob("*.part"))
