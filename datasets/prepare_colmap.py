"""Label files of a scene of one's own, from a COLMAP model (https://colmap.github.io/format.html).

    python -m datasets.prepare_colmap MODEL LABELS [--test_sequences seq2 ... | --every N]

MODEL is the folder of a model, text or binary, such as sparse/0. LABELS gets <scene>_train.csv and <scene>_test.csv with
the registered images: the camera's centre, in the model's unit, and the camera-to-world quaternion, scalar first and not
negative. Images are named as in the model.
"""
import argparse
import os
import struct
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from transforms3d.quaternions import mat2quat, quat2mat

from datasets.labels import COLUMNS, natural, write_labels
from util.errors import UserError

DEFAULT_EVERY = 8
NO_FOLDER = "seq-01"  # the sequence of images that are in no folder


def read_model(folder):
    """The registered images of a COLMAP model: a list of (name, pose), the pose as 7 numbers: the camera's centre, and the
    camera-to-world unit quaternion, scalar first and not negative.

    Raises UserError for a folder without a model, a model that cannot be read, and one without a registered image.
    """
    import pycolmap

    folder = Path(folder)
    suffixes = [suffix for suffix in (".bin", ".txt")
                if all((folder / f"{kind}{suffix}").is_file() for kind in ("cameras", "images", "points3D"))]
    if not suffixes:
        raise UserError(f"{folder}: no COLMAP model; give the folder of its cameras, images and points3D, all .bin or all "
                        f".txt, such as sparse/0")
    if suffixes[0] == ".bin":
        for kind in ("rigs", "frames", "images", "points3D"):
            if (folder / f"{kind}.bin").exists():
                _check_whole(folder / f"{kind}.bin")
    try:
        model = pycolmap.Reconstruction(folder)
        images = [model.image(i) for i in model.reg_image_ids()]
        poses = [(image.name, image.cam_from_world().rotation.quat, image.cam_from_world().translation) for image in images]
    except Exception as error:  # of many types: ValueError, IndexError, RuntimeError, MemoryError
        raise UserError(f"{folder}: not a readable COLMAP model: {error}") from error
    if not poses:
        raise UserError(f"{folder}: no registered image in the model")
    return [(name, _camera_pose(folder, name, quaternion[[3, 0, 1, 2]], translation))  # pycolmap has the scalar last
            for name, quaternion, translation in poses]


def label_table(frames, scene, is_test):
    """The labels of a scene: a DataFrame with labels.COLUMNS, in the order of sequences and frames.

    frames: a list of (image name, pose of 7 numbers).
    is_test: says of (sequence, number of the frame within it, from 1) whether the frame is for testing.
    """
    rows, counts = [], {}
    for sequence, name, pose in sorted(((_sequence(name), name, pose) for name, pose in frames),
                                       key=lambda frame: (natural(frame[0]), natural(frame[1]))):
        counts[sequence] = counts.get(sequence, 0) + 1
        split = "test" if is_test(sequence, counts[sequence]) else "train"
        rows.append([scene, split, sequence, name, *pose])
    return pd.DataFrame(rows, columns=COLUMNS)


def _sequence(name):
    folder = str(PurePosixPath(name).parent)
    return NO_FOLDER if folder == "." else folder


def _camera_pose(folder, name, quaternion, translation):
    """A pose of a world-to-camera quaternion and translation."""
    if not (np.isfinite([*quaternion, *translation]).all() and np.linalg.norm(quaternion) > 1e-6):
        raise UserError(f"{folder}: image {name} has no finite pose")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{folder}: image {name} leaves the dataset's folder; its name must be relative to that")
    rotation = quat2mat(quaternion)  # of the normalised quaternion
    return [float(value) for value in (*(-rotation.T @ translation), *mat2quat(rotation.T))]


def _check_whole(path):
    """Raise UserError for a binary file of a COLMAP model that ends early: pycolmap would read on, for ever or with made-up
    poses. The layout is that of COLMAP's reconstruction_io_binary.cc.
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


def _every(text):
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 2")
    return int(text)


def main():
    parser = argparse.ArgumentParser(prog="python -m datasets.prepare_colmap",
                                     description="Turn a COLMAP model into label files.")
    parser.add_argument("model", metavar="MODEL", help="the model's folder, such as sparse/0")
    parser.add_argument("labels_path", metavar="LABELS",
                        help="the folder to write <scene>_train.csv and <scene>_test.csv to")
    parser.add_argument("--scene", metavar="NAME", help="the scene's name (default: that of the LABELS folder)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--test_sequences", metavar="NAME", nargs="+",
                       help="the folders in the images' names that are for testing (default: none, see --every)")
    split.add_argument("--every", metavar="N", type=_every, default=DEFAULT_EVERY,
                       help=f"every N-th image of a sequence is for testing (default: {DEFAULT_EVERY})")
    args = parser.parse_args()
    scene = Path(args.labels_path).resolve().name if args.scene is None else args.scene
    if not scene.strip() or "/" in scene:
        raise UserError(f"--scene '{scene}': not a scene's name; it becomes a part of the files' names")

    frames = read_model(args.model)
    if args.test_sequences:
        sequences = sorted({_sequence(name) for name, _ in frames}, key=natural)
        for name in args.test_sequences:
            if name not in sequences:
                raise UserError(f"--test_sequences {name}: no such sequence in {args.model}; it has {', '.join(sequences)}")
        table = label_table(frames, scene, lambda sequence, number: sequence in args.test_sequences)
    else:
        table = label_table(frames, scene, lambda sequence, number: number % args.every == 0)
    for split in ("train", "test"):
        if split not in set(table["split"]):
            raise UserError(f"{args.model}: none of the {len(table)} registered images is in the {split} split; choose "
                            f"other --test_sequences, or another N for --every")
    for split in ("train", "test"):
        path = Path(args.labels_path) / f"{scene}_{split}.csv"
        rows = table[table["split"] == split]
        write_labels(path, rows)
        print(f"{path}: {len(rows)} frames")


if __name__ == "__main__":
    from util import cli

    cli.run(main)
