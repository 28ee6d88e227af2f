"""Label files of Cambridge Landmarks, from its official download.

    python -m datasets.prepare_cambridge DATASET_PATH [--download]

The layout: <Scene>/dataset_train.txt and dataset_test.txt, and the images that they name. After three header lines each
line is "seq1/frame00001.png X Y Z W P Q R": an image, its position in metres, and the world-to-camera quaternion,
scalar first. Label files have the same digits.
"""
from pathlib import Path, PurePosixPath

import pandas as pd

from datasets.labels import COLUMNS, natural_key, to_number
from datasets.official import CAMBRIDGE
from datasets.preparation import get_scenes, parse_arguments, write_label_files
from datasets.text_files import read_lines, reading
from util import cli
from util.errors import UserError, first_five

SPLIT_FILES = {"train": "dataset_train.txt", "test": "dataset_test.txt"}
HEADER_LINES = 3


def is_scene(folder):
    """Whether a folder has the layout of a scene, complete or not."""
    return any((folder / name).exists() for name in SPLIT_FILES.values()) or any(
        path.is_dir() for path in folder.glob("seq*"))


def read_scene(folder):
    """The labels of a scene's folder: {split: DataFrame with labels.COLUMNS}, in the order of sequences and frames.

    The pose is text, as in the file. Raises UserError for an image that is listed twice, and as read_split does.
    """
    tables, listed, problems = {}, {}, []
    for split, file_name in SPLIT_FILES.items():
        frames = read_split(folder / file_name)
        frames.sort(key=lambda frame: (natural_key(str(frame[0].parent)), natural_key(frame[0].name)))
        for image, _ in frames:
            if image in listed:
                problems.append(f"{folder / file_name}: image {image} is listed in {listed[image]} already; "
                                "list each once")
            listed[image] = folder / file_name
        rows = [[folder.name, split, str(image.parent), f"{folder.name}/{image}", *numbers]
                for image, numbers in frames]
        tables[split] = pd.DataFrame(rows, columns=COLUMNS)
    if problems:
        raise UserError(first_five(problems))
    unlisted = sorted(path for path in folder.glob("seq*/**/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")
                      and path.relative_to(folder) not in listed)
    if unlisted:
        print(f"{folder}: {len(unlisted)} images without a pose, in neither split, and left out: {unlisted[0]} ...")
    return tables


def read_split(path):
    """The frames that a split file lists, in its order: a list of (image relative to the scene, its 7 numbers as text).

    Raises UserError for a file that is missing or lists no frame, for a line that is not an image with 7 finite
    numbers, and for an image that is not in the scene's folder.
    """
    frames, problems = [], []
    for row, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if row > HEADER_LINES and not fields:
            continue
        problem = _problem(path.parent, row, line)
        if problem:
            problems.append(f"line {row}: {problem}")
        elif row > HEADER_LINES:
            frames.append((PurePosixPath(fields[0]), fields[1:]))
    if problems:
        raise UserError(f"{path}: {first_five(problems)}")
    if not frames:
        raise UserError(f"{path}: lists no frame; after {HEADER_LINES} header lines, a line must be like "
                        f"seq1/frame00001.png X Y Z W P Q R")
    return frames


def _problem(folder, row, line):
    """What is wrong with line `row` of a split file, or None."""
    fields = line.split()
    if row <= HEADER_LINES:
        return f"a frame among the {HEADER_LINES} header lines, which are skipped" if _is_frame(fields) else None
    if not _is_frame(fields):
        return (f"'{line}' is no frame; it must be an image and 7 finite numbers, X Y Z W P Q R, of which W P Q R are "
                f"not all 0")
    image = PurePosixPath(fields[0])
    if image.is_absolute() or ".." in image.parts:
        return f"image {image} is outside the scene's folder"
    return None if (folder / image).is_file() else f"image {folder / image} does not exist"


def _is_frame(fields):
    """Whether the fields of a line may be an image and its pose."""
    try:
        numbers = [to_number(field) for field in fields[1:]]
    except ValueError:
        return False
    return len(numbers) == 7 and all(abs(x) < 1e30 for x in numbers) and max(map(abs, numbers[3:])) > 1e-30


def main():
    """Prepare the scenes that the command line asks for."""
    args = parse_arguments("prepare_cambridge", CAMBRIDGE)
    scenes = get_scenes(args, CAMBRIDGE, is_scene)
    with reading(args.dataset_path):
        tables = {scene: read_scene(Path(args.dataset_path) / scene) for scene in scenes}
    write_label_files(args, CAMBRIDGE, tables)


if __name__ == "__main__":
    cli.run(main)
