"""Label files: `scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4`, one row per frame.

The position is in metres, the quaternion scalar first. Rows are numbered as in an editor: the header is row 1.

    python -m datasets.labels check FILE.csv [--dataset_path DIR]
    python -m datasets.labels fix FILE.csv OUT.csv
"""
import argparse
import csv
import logging
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import PurePath

import numpy as np
import pandas as pd

from datasets.descriptions import check_place, describe, write_description
from util import cli
from util.errors import UserError, first_five
from util.files import same_file, whole_file

POSE_COLUMNS = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]
COLUMNS = ["scene", "split", "seq", "img_path", *POSE_COLUMNS]
EXPECTED_COLUMNS = ["expected_position_error_m", "expected_orientation_error_deg"]  # of predictions
UNIT_TOLERANCE = 1e-3
OUTLIER_FACTOR = 10  # times the median distance from the median position of the scene
FAR_FACTOR = 10  # the same for the distance of the median position from the origin


def read_labels(path, columns=COLUMNS, optional=()):
    """Read a label file: a DataFrame with `columns`, the pose as float64, and `row`, the row's number in the file.

    columns: the columns to read, in the order of COLUMNS, the pose and img_path among them; the file may lack others.
    optional: more columns, as text, of which the file may have some.

    Raises UserError, with the file and the row, for a file that is missing, empty or no table, a missing column or
    cell, a pose that is not seven finite numbers or has a quaternion of zeros, and an image path outside the dataset.
    Predictions that were rejected as too novel are left out, with a warning.
    """
    table, unreadable = _parse(path, columns, optional)
    if unreadable:
        raise UserError(f"{path}: {first_five([f'row {row}: {problem}' for row, problem in unreadable])}")
    return table


def write_labels(path, table, description=None):
    """Write a DataFrame as a label file, completely or not at all. It has the DataFrame's columns without `row`.

    description: what goes beside it, see datasets.descriptions. Raises UserError where something else is there.
    """
    if description is not None:
        check_place(path)
    with whole_file(path) as file:
        table.drop(columns="row", errors="ignore").to_csv(file, index=False, lineterminator="\n")
    if description is not None:
        write_description(path, description, table["scene"])


def poses_of(table):
    """The poses of a label table: N x 7, float64."""
    return table[POSE_COLUMNS].to_numpy(dtype=float)


def far_origin(positions):
    """The median of positions (N x 3) that are far from the origin, or None, as for all published label files.

    Positions are far where the origin is FAR_FACTOR times as far from their median as half of them are. Float32
    resolves UTM or earth-centred coordinates to half a metre only, and a network's estimates begin near 0.
    """
    centre = np.median(positions, axis=0)
    spread = np.median(np.linalg.norm(positions - centre, axis=1))
    return centre if np.linalg.norm(centre) > FAR_FACTOR * (spread or 1) else None


def scene_indices(table, scene_names):
    """The scene index of every row: its scene's place in `scene_names`, or -1 for another scene."""
    index = {name: i for i, name in enumerate(scene_names)}
    return np.array([index.get(name, -1) for name in table["scene"]])


def to_number(text):
    """A text as a float. Raises ValueError for other texts, and for numbers of Python's own notation, such as 1_0."""
    if not text.isascii() or "_" in text:
        raise ValueError(f"could not convert string to float: '{text}'")
    return float(text)


def natural_key(name):
    """A sort key for names that contain numbers: seq2 before seq10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def find_problems(table, dataset_path=None):
    """The problems of a table of read_labels, in the order of its rows: a list of (row, kind, text).

    dataset_path: the folder of the images, to find missing ones (default: do not look for images).
    """
    problems = []
    rows, poses = table["row"].to_numpy(), poses_of(table)
    first_listed = {}
    for row, path in zip(rows, table["img_path"], strict=True):
        first = first_listed.setdefault(os.path.normpath(path), row)
        if first != row:
            problems.append((row, "image listed twice", f"image {path} is listed in row {first} already"))
        if dataset_path is not None and not os.path.isfile(os.path.join(dataset_path, path)):
            problems.append((row, "missing image", f"image {os.path.join(dataset_path, path)} does not exist"))
    norms = np.linalg.norm(poses[:, 3:], axis=1)
    for i in np.flatnonzero(np.abs(norms - 1) > UNIT_TOLERANCE):
        problems.append((rows[i], "quaternion that is not unit", f"the quaternion's norm is {norms[i]:.6g}, not 1"))
    for before, i in _neighbours(table):
        if poses[before, 3:] @ poses[i, 3:] < 0:
            text = f"the quaternion has the other sign than the frame before it, {table['img_path'].iloc[before]}"
            problems.append((rows[i], "change of the quaternion's sign", text))
    for i, factor in _outliers(table):
        text = f"the position is {factor:.4g} times as far from the scene's median position as half of the frames are"
        problems.append((rows[i], "position far outside the rest", text))
    return sorted(problems)


def summarize(table, problems):
    """One line about a table and its problems, a list of (row, kind, text).

    It has the number of frames, the number of problems of each kind, and the positions' median where the origin is far.
    """
    counts = [f"{kind}: {n}" for kind, n in Counter(kind for _, kind, _ in problems).items()]
    origin = None if table.empty else far_origin(poses_of(table)[:, :3])
    far = [] if origin is None else [f"positions far from the origin, around ({', '.join(f'{x:.3f}' for x in origin)})"]
    return ", ".join([f"{len(table)} frames", *(counts + far or ["nothing suspicious"])])


def log_summary(path, table):
    """Log in one line which problems the table of the label file at `path` has."""
    problems = find_problems(table)
    advice = f" (python -m datasets.labels check {path})" if problems else ""
    logging.info("Labels: %s%s", summarize(table, problems), advice)


def fix_labels(table):
    """Fix a table of read_labels. Returns the fixed table, and the changes as a list of (row, text).

    Outliers are dropped, and frames listed again with the same pose. Quaternions are normalised, and negated where
    their sign changes within a sequence.
    """
    again = table.assign(img_path=table["img_path"].map(os.path.normpath)).duplicated(["img_path", *POSE_COLUMNS])
    changes = [(row, "dropped: its image is listed before, with the same pose") for row in table["row"][again]]
    table = table[~again].reset_index(drop=True)
    while outliers := [i for i, _ in _outliers(table)]:  # without them others may become outliers
        changes += [(row, "dropped: its position is far outside the rest") for row in table["row"][outliers]]
        table = table.drop(index=outliers).reset_index(drop=True)

    quaternions = poses_of(table)[:, 3:]
    norms = np.linalg.norm(quaternions, axis=1)
    not_unit = np.abs(norms - 1) > UNIT_TOLERANCE
    changes += [(row, f"quaternion normalised, its norm was {norm:.6g}")
                for row, norm in zip(table["row"][not_unit], norms[not_unit], strict=True)]
    quaternions[not_unit] /= norms[not_unit, None]  # the others keep their digits
    for before, i in _neighbours(table):
        if quaternions[before] @ quaternions[i] < 0:
            quaternions[i] *= -1
            text = "quaternion negated: the same rotation, in the sign of the frame before it"
            changes.append((table["row"][i], text))
    table[POSE_COLUMNS[3:]] = quaternions
    return table, sorted(changes)


def _neighbours(table):
    """Positions in the table of neighbouring frames of a sequence, in pairs, in the order of the frames."""
    names = table["img_path"].map(natural_key)
    for _, positions in table.groupby(["scene", "split", "seq"], sort=False).indices.items():
        ordered = sorted(positions, key=lambda i: names.iloc[i])
        yield from pairwise(ordered)


def _outliers(table):
    """The frames far outside their scene: (position in the table, distance over the median distance) each."""
    for positions in table.groupby("scene", sort=False).indices.values():
        points = poses_of(table)[positions, :3]
        distances = np.linalg.norm(points - np.median(points, axis=0), axis=1)
        typical = np.median(distances)
        if typical > 0:  # otherwise most frames are in one place, which says nothing about the others
            yield from ((i, distance / typical) for i, distance in zip(positions, distances, strict=True)
                        if distance > OUTLIER_FACTOR * typical)


def read_table(path, columns):
    """Read a CSV file as text: its header, and its rows that are not blank, a list of (row, cells).

    Cells are stripped, and empty where a row has too few. Raises UserError for a file that is missing, empty or no
    table, for two columns of one name, and where one of `columns` is missing.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, skipinitialspace=True, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable label file: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise UserError(f"{path}: not a readable label file: it is empty; its first row must be {','.join(columns)}")
    header, *lines = ([cell.strip() for cell in line] for line in lines)
    twice = [column for column, n in Counter(header).items() if column and n > 1]
    if twice:
        raise UserError(f"{path}: column '{twice[0]}' appears twice")
    missing = [column for column in columns if column not in header]
    if missing:
        others = [name for name, separator in (("semicolons", ";"), ("tabs", "\t"))
                  if len(header) == 1 and separator in header[0]]
        raise UserError(f"{path}: column '{missing[0]}' is missing; the columns must be {','.join(columns)}"
                        + (f", separated by commas, not by {others[0]}" if others else ""))
    return header, [(row, line + [""] * (len(header) - len(line))) for row, line in enumerate(lines, 2) if any(line)]


def _parse(path, columns=COLUMNS, optional=()):
    """A label file's table as read_labels returns it, without unreadable rows; and these: a list of (row, problem)."""
    header, lines = read_table(path, columns)
    columns = [*(column for column in optional if column in header), *columns]
    places = {column: header.index(column) for column in columns}
    rows, unreadable, n_rejected = [], [], 0
    for row, cells in lines:
        if "rejected" in header and cells[header.index("rejected")] == "True":  # by --max_novelty
            n_rejected += 1
            continue
        frame, problem = parse_frame({column: cells[place] for column, place in places.items()})
        if any(cells[len(header):]):
            problem = f"{len(cells)} cells, but the header has {len(header)}"
        if problem:
            unreadable.append((row, problem))
        else:
            rows.append([*frame, row])
    if n_rejected:
        logging.warning("%s: %d rejected frames left out: they have no pose", path, n_rejected)
    if not rows and not unreadable:
        raise UserError(f"{path}: no rows; at least one frame is needed")
    table = pd.DataFrame(rows, columns=[*columns, "row"])
    return table.astype({**dict.fromkeys(columns, str), **dict.fromkeys(POSE_COLUMNS, float), "row": int}), unreadable


def parse_frame(cells):
    """Return a frame from a row's cells, {column: text}: its values, the pose as numbers; and a problem or None."""
    for column in ("scene", "img_path"):
        if not cells.get(column, "not asked for"):
            return None, f"{column} '{cells[column]}' is empty"
    pose = []
    for column in POSE_COLUMNS:
        cell = cells[column]
        try:
            pose.append(to_number(cell))
        except ValueError:
            pose.append(np.nan)
        if not abs(pose[-1]) < 1e30:
            return None, f"{column} '{cell}' is not a finite number"
    if max(map(abs, pose[3:])) < 1e-30:
        return None, "q1, q2, q3 and q4 are 0: no orientation"
    if any("\0" in cell for cell in cells.values()):
        return None, "has a zero byte in it; the file is damaged"
    path = cells["img_path"]
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        return None, f"img_path '{path}' leaves the dataset's folder"
    return [*(text for column, text in cells.items() if column not in POSE_COLUMNS), *pose], None


def _check(args):
    """Run the command `check`."""
    table, unreadable = _parse(args.labels_file)
    if args.dataset_path is not None and not os.path.isdir(args.dataset_path):
        raise UserError(f"--dataset_path {args.dataset_path}: no such folder; "
                        "give the one that img_path is relative to")
    problems = [(row, "unreadable row", problem) for row, problem in unreadable]
    problems = sorted(problems + find_problems(table, args.dataset_path))
    for row, _, problem in problems:
        print(f"row {row}: {problem}")
    print(f"{args.labels_file}: {summarize(table, problems)}")
    sys.exit(1 if problems else 0)


def _fix(args):
    """Run the command `fix`."""
    if same_file(args.labels_file, args.output):
        raise UserError(f"{args.output} is the file to fix, which stays as it is; name another")
    table, unreadable = _parse(args.labels_file)
    fixed, changes = fix_labels(table)
    if fixed.empty:
        raise UserError(f"{args.labels_file}: no readable row; nothing to write")
    write_labels(args.output, fixed, describe(args.labels_file))
    for row, text in sorted(changes + [(row, f"dropped: {problem}") for row, problem in unreadable]):
        print(f"row {row}: {text}")
    print(f"{args.output}: {summarize(fixed, find_problems(fixed))}")


def main():
    """Check or fix a label file."""
    parser = argparse.ArgumentParser(prog="python -m datasets.labels", description="Check or fix a label file.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check", help="list a file's problems, row by row; exit status 1 if it has any")
    command.add_argument("labels_file", metavar="FILE.csv")
    command.add_argument("--dataset_path", metavar="DIR",
                         help="the folder of the images, to find missing ones (default: do not look for images)")
    command.set_defaults(function=_check)
    command = commands.add_parser("fix", help="write a file without the problems that can be fixed; list the changes")
    command.add_argument("labels_file", metavar="FILE.csv")
    command.add_argument("output", metavar="OUT.csv", help="has the columns of a label file, and no others")
    command.set_defaults(function=_fix)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    cli.run(main)
