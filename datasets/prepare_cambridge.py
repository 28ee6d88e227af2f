"""Label files of Cambridge Landmarks, from its official download.

    python -m datasets.prepare_cambridge DATASET_PATH [--download]

The layout: <Scene>/dataset_train.txt and dataset_test.txt, three header lines and then "seq1/frame00001.png X Y Z W P Q R",
the position in metres and the world-to-camera quaternion, scalar first; and the images that they name. The numbers are
copied as they stand.
"""
from pathlib import Path, PurePosixPath

import pandas as pd

from datasets.downloads import get_scenes, parse_arguments, read_lines, reading, write_label_files
from datasets.labels import COLUMNS, natural, to_number
from util.errors import UserError, first_five

URL = "https://www.repository.cam.ac.uk/bitstream/handle/1810"
LICENCE = "https://www.repository.cam.ac.uk/handle/1810/251342"
ARCHIVES = {"KingsCollege": "251342/KingsCollege.zip", "OldHospital": "251340/OldHospital.zip",
            "ShopFacade": "251336/ShopFacade.zip", "StMarysChurch": "251294/StMarysChurch.zip",
            "GreatCourt": "251291/GreatCourt.zip"}
FOUR_SCENES = ("KingsCollege", "OldHospital", "ShopFacade", "StMarysChurch")
SPLIT_FILES = {"train": "dataset_train.txt", "test": "dataset_test.txt"}
HEADER_LINES = 3


def is_scene(folder):
    """Whether a folder is laid out as a scene, be it incomplete."""
    return any((folder / name).exists() for name in SPLIT_FILES.values()) or any(
        path.is_dir() for path in folder.glob("seq*"))


def read_scene(folder):
    """The labels of a scene's folder: {split: DataFrame with labels.COLUMNS}, in the order of sequences and frames, the
    pose as text.

    Raises UserError for an image that is listed twice, and as read_split does.
    """
    tables, listed, problems = {}, {}, []
    for split, file_name in SPLIT_FILES.items():
        frames = read_split(folder / file_name)
        frames.sort(key=lambda frame: (natural(str(frame[0].parent)), natural(frame[0].name)))
        for image, _ in frames:
            if image in listed:
                problems.append(f"{folder / file_name}: image {image} is listed in {listed[image]} already; list each "
                                f"once")
            listed[image] = folder / file_name
        rows = [[folder.name, split, str(image.parent), f"{folder.name}/{image}", *numbers] for image, numbers in frames]
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

    Raises UserError for a file that is missing or lists no frame, a line that is not an image with 7 finite numbers, and
    an image that is not in the scene's folder.
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
        raise UserError(f"{path}: lists no frame; behind {HEADER_LINES} header lines, a line must be like "
                        f"seq1/frame00001.png X Y Z W P Q R")
    return frames


def _problem(folder, row, line):
    """What is wrong with a line of a split file, or None."""
    fields = line.split()
    if row <= HEADER_LINES:
        return f"a frame among the {HEADER_LINES} header lines, which are not read" if _is_frame(fields) else None
    if not _is_frame(fields):
        return (f"'{line}' is no frame; it must be an image and 7 finite numbers, X Y Z W P Q R, of which W P Q R are "
                f"not all 0")
    image = PurePosixPath(fields[0])
    if image.is_absolute() or ".." in image.parts:
        return f"image {image} is outside the scene's folder"
    return None if (folder / image).is_file() else f"image {folder / image} does not exist"


def _is_frame(fields):
    try:
        numbers = [to_number(field) for field in fields[1:]]
    except ValueError:
        return False
    return len(numbers) == 7 and all(abs(x) < 1e30 for x in numbers) and max(map(abs, numbers[3:])) > 1e-30


def main():
    args = parse_arguments("prepare_cambridge", "CambridgeLandmarks", URL, ARCHIVES)
    scenes = get_scenes(args, "Cambridge Landmarks", LICENCE, ARCHIVES, is_scene)
    with reading(args.dataset_path):
        tables = {scene: read_scene(Path(args.dataset_path) / scene) for scene in scenes}
    write_label_files(args, "abs_cambridge_pose_sorted.csv", "cambridge_four_scenes.csv", FOUR_SCENES, tables)


if __name__ == "__main__":
    from util import cli

    cli.run(main)
