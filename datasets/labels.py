"""Label files: `scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4`, a frame a row.

The position is in metres; the quaternion is scalar first. A row is named by its number in the file as an editor or a
spreadsheet shows it: the header is row 1.
"""
import warnings
from pathlib import PurePath

import numpy as np
import pandas as pd

from util.errors import UserError
from util.files import whole_file

POSE_COLUMNS = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]
COLUMNS = ["scene", "split", "seq", "img_path", *POSE_COLUMNS]


def read_labels(path):
    """Read a label file: a DataFrame with COLUMNS, the pose as float64, and `row`, the row's number in the file.

    Raises UserError, naming file and row, for a file that is missing, empty or no table, a missing column or cell, a
    pose that is not seven finite numbers with a quaternion other than zero, and an image path outside the dataset.
    """
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # rows longer than the header
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = pd.read_csv(file, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False).fillna("")
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path}: not a readable label file: {getattr(error, 'strerror', None) or error}") from error
    table = table.rename(columns=str.strip)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path}: column '{missing[0]}' is missing; the columns must be {','.join(COLUMNS)}")
    if table.columns.duplicated().any():
        raise UserError(f"{path}: column '{table.columns[table.columns.duplicated()][0]}' is there twice")
    table = table[COLUMNS].assign(row=np.arange(len(table)) + 2)
    table = table[(table[COLUMNS] != "").any(axis=1)].reset_index(drop=True)
    if table.empty:
        raise UserError(f"{path}: no rows; at least one frame is needed")

    for column in ("scene", "img_path"):
        _refuse(path, table, column, table[column].str.strip() == "", "is empty")
    for column in POSE_COLUMNS:
        numbers = pd.to_numeric(table[column], errors="coerce").astype(float)
        _refuse(path, table, column, ~(np.abs(numbers) < 1e30), "is not a finite number")
        table[column] = numbers
    zero = (np.abs(table[POSE_COLUMNS[3:]]) < 1e-30).all(axis=1)
    _refuse(path, table, "q1", zero, "and q2, q3, q4 are 0: no orientation")
    outside = [PurePath(p).is_absolute() or ".." in PurePath(p).parts for p in table["img_path"]]
    _refuse(path, table, "img_path", np.array(outside), "leaves the dataset's folder")
    return table


def write_labels(path, table):
    """Write a DataFrame as a label file, whole or not at all, with the columns it has (`row` left out)."""
    with whole_file(path) as file:
        table.drop(columns="row", errors="ignore").to_csv(file, index=False, lineterminator="\n")


def poses_of(table):
    """The poses of a label table: N x 7, float64."""
    return table[POSE_COLUMNS].to_numpy(dtype=float)


def scene_indices(table, scene_names):
    """The scene index of every row: its scene's place in `scene_names`, -1 for a scene that is not there."""
    index = {name: i for i, name in enumerate(scene_names)}
    return np.array([index.get(name, -1) for name in table["scene"]])


def _refuse(path, table, column, wrong, problem):
    if np.any(wrong):
        first = int(np.argmax(np.asarray(wrong)))
        raise UserError(f"{path}: row {table['row'][first]}: {column} '{table[column][first]}' {problem}")
