"""Label files of your own scene, from a COLMAP model (https://colmap.github.io/format.html).

    python -m datasets.prepare_colmap MODEL LABELS [--images DIR] [--test_sequences seq2 ... | --every N]
                                      [--scale_by IMG_A IMG_B METRES]

MODEL is the folder of a model, text or binary, or a folder with one in `0`, `sparse` or `sparse/0`. LABELS gets
<scene>_train.csv and <scene>_test.csv with the registered images (COLMAP writes no others): the camera's centre, in the
model's unit or in metres, and the camera-to-world quaternion, scalar first and not negative. Images have their names in
the model. <scene>_train.json and <scene>_test.json say the unit.
"""
import argparse
import os
import posixpath
import re
import struct
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
from transforms3d.quaternions import mat2quat, quat2mat

from datasets.labels import natural_key, to_number
from datasets.preparation import (
    add_scale_by,
    add_split,
    check_scene_name,
    label_table,
    print_next_commands,
    scale_between,
    scaled,
    sequence_of,
    split_every,
    split_stretches,
    write_scene,
)
from datasets.text_files import reading
from util import cli
from util.errors import UserError, first_five
from util.files import writing

MODEL_FILES = ("cameras", "images", "points3D")
TEXT_FILES = ("cameras", "rigs", "frames", "points3D")  # beside images.txt
UNIT_TOLERANCE = 0.01  # of a quaternion's norm, to tell a line of an image from a line of points


def read_model(folder):
    """The registered images of a COLMAP model: a list of (name, pose).

    The pose is 7 numbers: the camera's centre, and the camera-to-world unit quaternion, scalar first and not negative.
    Raises UserError for a folder without a model, a model that cannot be read or has no registered image, images
    without a finite pose or outside the dataset's folder, and an image that is listed twice.
    """
    folder = Path(folder)
    suffix = _model_suffix(folder)
    if suffix is None:
        raise UserError(f"{folder}: no COLMAP model; give the folder of its cameras, images and points3D, all .bin or "
                        f"all .txt, such as sparse/0")
    if suffix == ".bin":
        for kind in ("rigs", "frames", "images", "points3D"):
            if (folder / f"{kind}.bin").exists():
                _check_whole(folder / f"{kind}.bin")
        images = _registered_images(folder, folder)
    else:
        images = _read_text_model(folder)
    if not images:
        raise UserError(f"{folder}: no registered image in the model")
    _check_images(folder, images)
    return [(name, _camera_pose(quaternion, translation)) for _, name, quaternion, translation in images]


def find_model(folder):
    """The folder of the model at or below a folder: itself, or `0`, `sparse` or `sparse/0` in it; else itself."""
    places = (Path(folder, below) for below in ("", "0", "sparse", "sparse/0"))
    return next((place for place in places if _model_suffix(place)), Path(folder))


def check_images_exist(folder, names):
    """Raise UserError for images that a folder lacks. names: the images' paths in it."""
    if not os.path.isdir(folder):
        raise UserError(f"--images {folder}: no such folder; give the one that the images' names are relative to")
    missing = [name for name in sorted(names, key=natural_key) if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        shown = ", ".join([*missing[:5], *([f"and {len(missing) - 5} more"] if len(missing) > 5 else [])])
        raise UserError(f"--images {folder}: {len(missing)} of the model's {len(names)} images do not exist in it: "
                        f"{shown}; give the folder that the images' names are relative to")


def _model_suffix(folder):
    """The suffix of the model's files in a folder, .bin or .txt, or None without a model."""
    return next((suffix for suffix in (".bin", ".txt")
                 if all((folder / f"{kind}{suffix}").is_file() for kind in MODEL_FILES)), None)


def _registered_images(folder, copy):
    """The registered images of a model, read by pycolmap.

    copy: where the model is read from. folder: where the user has it, for messages. Returns a list of (id, name,
    world-to-camera quaternion, scalar first, translation).
    """
    import pycolmap

    try:
        model = pycolmap.Reconstruction(copy)
        ids = sorted(model.reg_image_ids())
        images = [(i, model.image(i).name, model.image(i).cam_from_world()) for i in ids]
    except Exception as error:  # of many types: ValueError, IndexError, RuntimeError, MemoryError
        text = str(error).replace(str(copy), str(folder))
        raise UserError(f"{folder}: not a readable COLMAP model: {text}") from error
    return [(i, name, pose.rotation.quat[[3, 0, 1, 2]], pose.translation) for i, name, pose in images]


def _read_text_model(folder):
    """The images of a text model, as _registered_images returns them.

    pycolmap cuts names at a space, and takes every second line of images.txt for points, whatever it contains. So it
    reads a copy in which each image has its id as name, and a line of points.
    """
    images = _read_images(folder / "images.txt")
    _check_images(folder, [(i, name, values[:4], values[4:]) for i, (name, values, _) in images.items()])
    with tempfile.TemporaryDirectory() as copy:
        for kind in TEXT_FILES:
            if (folder / f"{kind}.txt").exists():
                os.symlink((folder / f"{kind}.txt").resolve(), f"{copy}/{kind}.txt")
        with writing(f"{copy}/images.txt"), open(f"{copy}/images.txt", "w", encoding="ascii") as file:
            file.writelines(f"{text}\n" for _, _, text in images.values())
        return [(i, images[i][0], *pose) for i, _, *pose in _registered_images(folder, copy)]


def _read_images(path):
    """The contents of images.txt: {id: (name, 7 numbers, the image's two lines for pycolmap)}.

    Raises UserError for a line that is neither an image nor the points of the image before it, for an id that is listed
    twice, and for a number of images other than the header's.
    """
    images, places, problems, expected = {}, {}, [], None
    last = None  # the id of the image whose points are due
    with reading(path), open(path, encoding="utf-8-sig") as file:
        for row, line in enumerate(file, start=1):
            line = line.strip()
            if line.startswith("#"):
                header = re.search(r"Number of images:\s*(\d+)", line)
                expected = int(header[1]) if header and expected is None else expected
                continue
            if last is not None and _is_points(line.split()):
                name, values, text = images[last]
                images[last] = name, values, text + " ".join(line.split())
                last = None
                continue
            if not line:
                continue
            image = _read_image(line, last is not None)
            if image is None:
                raise UserError(f"{path}: line {row}: '{line[:60]}' is neither an image, IMAGE_ID QW QX QY QZ TX TY TZ "
                                f"CAMERA_ID NAME, nor points of the image before it, X Y POINT3D_ID ...")
            last, name, values, text = image
            if last in places:
                problems.append(f"line {row}: image id {last} is listed in line {places[last]} already; list each once")
            places[last] = row
            images[last] = name, values, f"{text} {last}\n"
    if problems:
        raise UserError(f"{path}: {first_five(problems)}")
    if expected not in (None, len(images)):
        raise UserError(f"{path}: {len(images)} images, but its header says {expected}; fix the one that is wrong")
    return images


def _read_image(line, doubtful):
    """The image of a line in images.txt: (id, name, 7 numbers, the fields before the name), or None for another line.

    doubtful: whether points are due, so that the line may be damaged points.
    """
    try:
        *fields, name = line.split(maxsplit=9)
        values = [to_number(field) for field in fields[1:8]]
    except ValueError:
        return None
    if len(fields) != 9 or not re.fullmatch("[0-9]+ [0-9]+", f"{fields[0]} {fields[8]}"):
        return None
    is_unit = abs(np.linalg.norm(values[:4]) - 1) < UNIT_TOLERANCE
    if not is_unit and (doubtful or _are_all(float, name.split())):
        return None
    return int(fields[0]), name, values, " ".join(fields)


def _is_points(fields):
    """Whether the fields of a line are points: X Y POINT3D_ID ..."""
    return len(fields) % 3 == 0 and _are_all(int, fields[2::3]) and _are_all(float, fields)


def _are_all(kind, fields):
    """Whether all texts are numbers of the type `kind`."""
    try:
        list(map(kind, fields))
    except ValueError:
        return False
    text = "".join(fields)  # one check for all: there may be very many
    return text.isascii() and "_" not in text


def _check_images(folder, images):
    """Raise UserError for images, as _registered_images returns them, that cannot be in a label file."""
    problems, listed = [], {}
    for i, name, quaternion, translation in images:
        if not (np.isfinite([*quaternion, *translation]).all() and np.linalg.norm(quaternion) > 1e-6):
            problems.append(f"image {name} has no finite pose")
        elif PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"image {name} leaves the dataset's folder; its name must be relative to that")
        elif not name.strip():
            problems.append(f"image id {i} has no name")
        else:
            first, first_name = listed.setdefault(posixpath.normpath(name), (i, name))
            if first != i:
                problems.append(f"image {name} (id {i}) is listed as {first_name} (id {first}) already; list each once")
    if problems:
        raise UserError(f"{folder}: {first_five(problems)}")


def _camera_pose(quaternion, translation):
    """The pose, 7 numbers, of a camera with a world-to-camera quaternion and translation."""
    rotation = quat2mat(quaternion)  # normalises
    return [float(value) for value in (*(-rotation.T @ translation), *mat2quat(rotation.T))]


def _check_whole(path):
    """Raise UserError for a binary file of a COLMAP model that ends early.

    pycolmap would read on, without end or with wrong poses. The layout is that of COLMAP's reconstruction_io_binary.cc.
    """
    with open(path, "rb") as file:
        def number(layout):
            return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]

        def skip(size):
            file.seek(size, os.SEEK_CUR)

        try:
            for _ in range(number("<Q")):
                if path.stem == "images":
                    skip(64)
                    while number("c") != b"\0":
                        pass
                    skip(24 * number("<Q"))
                elif path.stem == "points3D":
                    skip(43)
                    skip(8 * number("<Q"))
                elif path.stem == "frames":
                    skip(64)
                    skip(16 * number("<I"))
                else:
                    skip(4)
                    n_sensors = number("<I")
                    skip(8 * min(n_sensors, 1))
                    for _ in range(n_sensors - 1):
                        skip(8)
                        skip(56 * number("<B"))
            whole = file.tell() <= os.path.getsize(path)
        except (struct.error, OverflowError, OSError):
            whole = False
    if not whole:
        raise UserError(f"{path}: a truncated or damaged file of a COLMAP model")


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m datasets.prepare_colmap",
                                     description="Turn a COLMAP model into label files.")
    parser.add_argument("model", metavar="MODEL", help="the model's folder, such as sparse/0, or one above it")
    parser.add_argument("labels_path", metavar="LABELS",
                        help="the folder to write <scene>_train.csv and <scene>_test.csv to")
    parser.add_argument("--scene", metavar="NAME", help="the scene's name (default: that of the LABELS folder)")
    parser.add_argument("--images", metavar="DIR",
                        help="the folder that the images' names are relative to, to check that all exist (default: do "
                             "not look for images)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--test_sequences", metavar="NAME", nargs="+",
                       help="the folders, in the images' names, whose images are for testing (default: none, see "
                            "--every)")
    add_split(split)
    add_scale_by(parser)
    return parser.parse_args()


def main():
    """Write the label files that the command line asks for."""
    args = parse_arguments()
    scene = check_scene_name("--scene", args.scene, args.labels_path)
    folder = find_model(args.model)
    frames = read_model(folder)
    if folder != Path(args.model):
        print(f"{folder}: the model that is read")
    if args.images is not None:
        check_images_exist(args.images, [name for name, _ in frames])
    if args.scale_by is not None:
        frames = scaled(frames, scale_between(frames, args.scale_by))

    split = split_stretches
    if args.test_sequences:
        found = sorted({sequence_of(name) for name, _ in frames}, key=natural_key)
        for name in args.test_sequences:
            if name not in found:
                raise UserError(f"--test_sequences {name}: no such sequence in {folder}; it has {', '.join(found)}")

        def split(sequences):
            return ["test" if sequence in args.test_sequences else "train" for sequence in sequences]
    elif args.every is not None:
        def split(sequences):
            return split_every(sequences, args.every)
    table = label_table(frames, scene, split)
    write_scene(folder, args.labels_path, scene, table, "model units" if args.scale_by is None else "m")
    if args.scale_by is None:
        print("Positions are in the model's unit; --scale_by turns them into metres")
    if args.images is None:
        print("IMAGES below is the folder that the images' names are relative to")
    print_next_commands(args.images or "IMAGES", args.labels_path, scene, table)


if __name__ == "__main__":
    cli.run(main)
