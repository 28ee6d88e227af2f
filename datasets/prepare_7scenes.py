"""Label files of 7Scenes, from its official download (or from your own rooms in the same layout).

    python -m datasets.prepare_7scenes DATASET_PATH [--download] [--skip_bad_poses]

The layout: <scene>/TrainSplit.txt and TestSplit.txt name sequences (lines like "sequence1"). <scene>/seq-01/ holds
frame-000000.color.png and frame-000000.pose.txt, the 4 x 4 matrix from camera to world in metres. A label is the
matrix's translation, and its rotation as a unit quaternion, scalar first and not negative.
"""
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
from transforms3d.quaternions import mat2quat

from datasets.labels import COLUMNS, natural_key, to_number
from datasets.official import SEVEN_SCENES
from datasets.preparation import get_scenes, parse_arguments, write_label_files
from datasets.text_files import read_lines, reading
from util import cli
from util.errors import UserError, first_five

SPLIT_FILES = {"train": "TrainSplit.txt", "test": "TestSplit.txt"}
RIGID_TOLERANCE = 0.1  # of the entries of R R^T and of the matrix's last row
NOT_A_NUMBER = re.compile(r"[-+]?(\d\.#[A-Z]+\d*|nan\(\w*\))", re.IGNORECASE)  # Windows writes 1.#INF00, -nan(ind)


def is_scene(folder):
    """Whether a folder has the layout of a scene, complete or not."""
    return any((folder / name).exists() for name in SPLIT_FILES.values()) or any(
        path.is_dir() or path.suffix == ".zip" for path in folder.glob("seq-*"))


def read_scene(folder, skip_bad_poses=False):
    """The labels of a scene's folder: {split: DataFrame with labels.COLUMNS}, in the order of sequences and frames.

    skip_bad_poses: whether frames whose pose is not finite are left out.
    Raises UserError for a missing split file, for one that names no sequence, a sequence that does not exist or a
    sequence twice, and for the problems that read_sequence finds.
    """
    tables, named, problems, not_finite = {}, {}, [], []
    for split, file_name in SPLIT_FILES.items():
        sequences = read_split(folder / file_name)
        for sequence, place in sequences:
            if sequence in named:
                raise UserError(f"{place}: {sequence} is named in {named[sequence]} already; name each sequence once")
            named[sequence] = place
            if not (folder / sequence).is_dir():
                raise UserError(f"{place}: no folder {folder / sequence}")
        rows = []
        for sequence in sorted((sequence for sequence, _ in sequences), key=natural_key):
            frames, found, bad = read_sequence(folder / sequence, skip_bad_poses)
            rows += [[folder.name, split, sequence, f"{folder.name}/{sequence}/{image}", *pose]
                     for image, pose in frames]
            problems += found
            not_finite += [f"{sequence}/{frame}" for frame in bad]
        tables[split] = pd.DataFrame(rows, columns=COLUMNS)
    if problems:
        hint = "; --skip_bad_poses leaves out the frames whose pose is not finite"
        raise UserError(first_five(problems) + (hint if not_finite and not skip_bad_poses else ""))
    if skip_bad_poses:
        names = ", ".join(not_finite[:5] + ["..."] * (len(not_finite) > 5))
        print(f"{folder}: {len(not_finite)} frames left out, whose pose is not finite{': ' if names else ''}{names}")
    unnamed = sorted(path.name for path in folder.glob("seq-*") if path.is_dir() and path.name not in named)
    if unnamed:
        print(f"{folder}: in neither split, and left out: {', '.join(unnamed)}")
    return tables


def read_split(path):
    """The sequences that a split file names: a list of (folder, such as 'seq-01', and where it is named)."""
    sequences = []
    for row, line in enumerate(read_lines(path), start=1):
        name = re.fullmatch(r"sequence\s*(\d{1,6})", line, re.IGNORECASE)
        if line and not name:
            raise UserError(f"{path}: line {row}: '{line}' is no sequence; a line must be like sequence1")
        if line:
            sequences.append((f"seq-{int(name[1]):02d}", f"{path}: line {row}"))
    if not sequences:
        raise UserError(f"{path}: names no sequence; a line must be like sequence1")
    return sequences


def read_sequence(folder, skip_bad_poses=False):
    """The contents of a sequence's folder, in the order of the frames: (frames, problems, not_finite).

    frames: a list of (image's file name, pose of 7 numbers).
    problems: a list of texts about a folder without frames, images without a pose, poses without an image, and poses
        that read_pose refuses. With skip_bad_poses, poses that are not finite are no problem, unless no frame is left.
    not_finite: the names of the frames whose pose is not finite.
    """
    names = [name for name in sorted(os.listdir(folder), key=natural_key) if name.startswith("frame-")]
    poses = {name.removesuffix(".pose.txt") for name in names if name.endswith(".pose.txt")}
    images = {}  # {frame: image's file name}
    for suffix in (".color.jpg", ".color.png"):  # png where both exist
        images.update({name.removesuffix(suffix): name for name in names if name.endswith(suffix)})
    if not images and not poses:
        return [], [f"{folder}: no frame-*.color.png and no frame-*.pose.txt in it"], []
    frames, not_finite = [], []
    lone = sorted(poses - set(images), key=natural_key)
    problems = [f"{folder / frame}.pose.txt: a pose without its image, {frame}.color.png or .jpg" for frame in lone]
    for frame, image in sorted(images.items(), key=lambda item: natural_key(item[0])):
        try:
            if frame not in poses:
                raise UserError(f"{folder / image}: an image without its pose, {frame}.pose.txt")
            frames.append((image, read_pose(folder / f"{frame}.pose.txt")))
        except NotFinite as error:
            not_finite.append(frame)
            problems += [] if skip_bad_poses else [str(error)]
        except UserError as error:
            problems.append(str(error))
    if not frames and not problems:
        problems = [f"{folder}: no frame is left; none of its {len(not_finite)} poses is finite"]
    return frames, problems, not_finite


def read_pose(path):
    """The pose in a file of a 4 x 4 camera-to-world matrix: 7 numbers, the position in metres, then the quaternion.

    Raises NotFinite for 4 rows of 4 numbers that are not all finite. Raises UserError for anything else that is not a
    rigid motion within RIGID_TOLERANCE.
    """
    rows = [line.split() for line in read_lines(path) if line]
    if [len(row) for row in rows] != [4, 4, 4, 4]:
        raise UserError(f"{path}: {len(rows)} rows with {sum(map(len, rows))} numbers; a pose is 4 rows of 4")
    try:
        matrix = np.array([[to_number(NOT_A_NUMBER.sub("nan", text)) for text in row] for row in rows])
    except ValueError as error:
        raise UserError(f"{path}: not a matrix of numbers: {error}") from error
    not_finite = ~(np.abs(matrix) < 1e30)
    if not_finite.any():
        raise NotFinite(f"{path}: {np.array(rows)[not_finite][0]} in it; a pose must be finite numbers")
    rotation = matrix[:3, :3]
    deviation = max(np.abs(rotation @ rotation.T - np.eye(3)).max(), np.abs(matrix[3] - [0, 0, 0, 1]).max())
    if deviation > RIGID_TOLERANCE or np.linalg.det(rotation) <= 0:
        raise UserError(f"{path}: no rotation and translation; a pose is a 3 x 3 rotation, the position in the fourth "
                        f"column, and a last row of 0 0 0 1")
    return [round(float(value), 9) for value in (*matrix[:3, 3], *mat2quat(rotation))]


class NotFinite(UserError):
    """A pose file with numbers that are not finite."""


def main():
    """Prepare the scenes that the command line asks for."""
    args = parse_arguments("prepare_7scenes", SEVEN_SCENES, {
        "--skip_bad_poses": "leave out the frames whose pose is not finite (default: they are an error)"})
    scenes = get_scenes(args, SEVEN_SCENES, is_scene, inner="seq-*.zip")
    with reading(args.dataset_path):
        tables = {scene: read_scene(Path(args.dataset_path) / scene, args.skip_bad_poses) for scene in scenes}
    write_label_files(args, SEVEN_SCENES, tables)


if __name__ == "__main__":
    cli.run(main)
