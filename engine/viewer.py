"""A page to look at poses: cameras in 3D, and the image and the numbers of each.

    python -m engine.viewer PREDICTIONS.csv [OUT.html] --dataset_path DIR [--labels_file TRUE.csv]
        [--training_labels TRAIN.csv] [--scene NAME] [--convention {7Scenes,CambridgeLandmarks,colmap}]

The convention is that of the labels that the APR was trained on, as in datasets.export_poses: the poses alone do not
tell it. The page is one file, which needs no network: it holds plotly's JavaScript, the poses and small images. Its
template is viewer.html.
"""
import argparse
import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from datasets.descriptions import read_unit
from datasets.export_poses import camera_to_world, known_convention
from datasets.labels import POSE_COLUMNS, far_origin, natural_key, poses_of, read_labels
from datasets.official import CONVENTIONS
from engine.plots import COLOURS, LEAST, limits_of
from engine.thumbnails import read_thumbnails
from util import cli
from util.errors import UserError
from util.files import same_file, whole_file
from util.metrics import pose_err

ERRORS = ["position_error_m", "orientation_error_deg"]
# Columns that some predictions have, and what the page calls them; {unit} is that of positions.
SHOWN = {"position_error_m": "position error [{unit}]", "orientation_error_deg": "orientation error [deg]",
         "novelty": "novelty", "expected_position_error_m": "expected position error [{unit}]",
         "expected_orientation_error_deg": "expected orientation error [deg]", "rejected": "rejected",
         "predicted_scene": "predicted scene", "scene_probability": "scene probability"}
FRUSTUM = (0.6, 0.45, 1)  # half the width, half the height, and the depth of a camera, relative to its size


def frusta(rotations, positions, size):
    """Corners of cameras: N x 5 x 3. The first is the camera's centre, the others are the image's from top left on.

    rotations: camera-to-world, a scipy Rotation of N. positions: N x 3. size: the depth, in the unit of positions.
    """
    x, y, z = np.array(FRUSTUM) * size
    corners = np.array([(0, 0, 0), (-x, -y, z), (x, -y, z), (x, y, z), (-x, y, z)])
    return positions[:, None] + np.einsum("nij,kj->nki", rotations.as_matrix(), corners)


def read_predictions(path, scene=None):
    """The frames of a file of predictions in natural order, those of `scene` if given, and the scene's name or None.

    The scene is that of the labels, else the predicted one. Raises UserError as read_labels does, and for frames of
    several scenes, whose coordinates have nothing in common.
    """
    table = read_labels(path, ["img_path", *POSE_COLUMNS], optional=("scene", *SHOWN))
    column = next((column for column in ("scene", "predicted_scene") if column in table), None)
    if column:
        table, scene = _of_scene(path, table, column, scene)
    order = sorted(table.index, key=lambda i: natural_key(table["img_path"][i]))
    return table.loc[order].reset_index(drop=True), scene


def read_truth(path, names):
    """The true poses of named frames, N x 7, NaN for frames that the label file lacks; these are counted in a line.

    Raises UserError for a file that has none of the frames, or one of them twice.
    """
    table = read_labels(path, ["img_path", *POSE_COLUMNS])
    table = table[table["img_path"].isin(names)]
    twice = table["img_path"].duplicated()
    if twice.any():
        raise UserError(f"{path}: row {table['row'][twice].iloc[0]}: img_path '{table['img_path'][twice].iloc[0]}' "
                        "appears twice, but has one true pose")
    truth = table.set_index("img_path")[POSE_COLUMNS].reindex(names).to_numpy()
    lacking = np.isnan(truth[:, 0])
    if lacking.all():
        raise UserError(f"{path}: has none of the {len(names)} frames, such as '{names[0]}': these are labels of other "
                        "frames, or their paths begin in another folder")
    if lacking.any():
        print(f"{path}: lacks {lacking.sum()} of {len(names)} frames, such as {names[lacking.argmax()]}; they are "
              "shown without a true pose")
    return truth


def read_training(path, scene):
    """The training poses of a label file, M x 7, those of `scene` if known; a row of NaN follows each sequence."""
    table = read_labels(path)
    table, _ = _of_scene(path, table, "scene", scene)
    rows = []
    for _, frames in table.groupby(["scene", "split", "seq"], sort=False):
        ordered = sorted(frames.index, key=lambda i: natural_key(frames["img_path"][i]))
        rows += [poses_of(frames.loc[ordered]), np.full((1, 7), np.nan)]
    return np.concatenate(rows)


def _of_scene(path, table, column, scene):
    """The rows of a scene, by default of the only one, and its name."""
    scenes = list(table[column].unique())
    if scene is None and len(scenes) > 1:
        raise UserError(f"{path}: frames of {len(scenes)} scenes, each with coordinates of its own; choose one with "
                        f"--scene: {', '.join(scenes)}")
    scene = scenes[0] if scene is None else scene
    if scene not in scenes:
        raise UserError(f"{path}: no frames of scene '{scene}'; it has {', '.join(scenes)}")
    return table[table[column] == scene], scene


def add_errors(table, truth):
    """Add the errors of a table's poses to it, in place of those that it has. truth: N x 7, NaN where unknown."""
    table[ERRORS] = np.stack([error.numpy() for error in pose_err(
        torch.from_numpy(poses_of(table)), torch.from_numpy(truth))], axis=1)


def colouring(table, unit):
    """What cameras are coloured by: its name, N numbers with NaN where unknown, and the end of the scale.

    The name is None without errors and novelty.
    """
    for column, name in ((ERRORS[0], SHOWN[ERRORS[0]].format(unit=unit)), ("novelty", "novelty")):
        if column in table:
            values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
            finite = values[np.isfinite(values)]
            if len(finite):
                return name, values, max(float(np.percentile(finite, 95)), LEAST)
    return None, np.full(len(table), np.nan), 1.0


def texts_of(table, truth, unit):
    """The labels of the numbers beside a camera's image, and per frame their values as text, empty for unknown ones."""
    columns = {"image": list(table["img_path"])}
    for name, poses in (("estimated", poses_of(table)), ("true", truth)):
        if poses is not None:
            known = np.isfinite(poses).all(axis=1)
            for label, part in ((f"{name} position [{unit}]", poses[:, :3]), (f"{name} quaternion", poses[:, 3:])):
                columns[label] = [", ".join(f"{x:.4f}" for x in row) if is_known else ""
                                  for row, is_known in zip(part, known, strict=True)]
    for column in (column for column in SHOWN if column in table):
        columns[SHOWN[column].format(unit=unit)] = [_text(value) for value in table[column]]
    return list(columns), list(zip(*columns.values(), strict=True))


def _text(value):
    """A cell as short text."""
    try:
        return f"{float(value):.4g}" if np.isfinite(float(value)) else ""
    except ValueError:
        return value


def scene_of(poses, truth, training, convention):
    """The geometry of the page: corners, training positions, axes and the view, ready for JSON.

    The page draws the axes in 'order': the last one, upwards, is the one nearest to the images' mean vertical. Its
    range is from high to low where it points down.
    poses: N x 7. truth: N x 7 with NaN, or None. training: M x 7 with NaN, or None.
    Prints how many cameras are outside the ranges, which leave out what is far from the rest.
    """
    true = np.full((len(poses), 7), np.nan) if truth is None else truth
    known = np.isfinite(true).all(axis=1)
    trained = np.zeros((0, 7)) if training is None else training[np.isfinite(training).all(axis=1)]
    reference = np.concatenate((true[known], trained)) if known.any() or len(trained) else poses
    origin = far_origin(reference[:, :3])  # float32, which the page draws in, would move cameras far from 0
    origin = np.zeros(3) if origin is None or np.abs(origin).max() < 1000 else origin.round()
    everything = np.concatenate((true[known], trained, poses))[:, :3] - origin
    ranges = np.array([limits_of(everything[:, k]) for k in range(3)])
    size = 0.02 * np.linalg.norm(np.ptp(ranges, axis=1)) * min(1, 500 / len(poses)) ** (1 / 3)
    ranges += (-size, size)
    outside = ((everything < ranges[:, 0]) | (everything > ranges[:, 1])).any(axis=1)
    ends = np.cumsum([known.sum(), len(trained)])
    for kind, rows in zip(("true", "training", "estimated"), np.split(outside, ends), strict=True):
        if rows.any():
            print(f"Outside the picture, far from the rest: {rows.sum()} of {len(rows)} {kind} poses")

    corners = np.full((2, len(poses), 15), np.nan)
    for kind, rows, of_kind in ((0, slice(None), poses), (1, known, true[known])):
        if len(of_kind):
            rotations, positions = camera_to_world(of_kind, convention)
            corners[kind, rows] = frusta(rotations, positions - origin, size).reshape(-1, 15)
    down = camera_to_world(reference, convention)[0].apply((0, 1, 0)).mean(axis=0)
    up = int(np.abs(down).argmax())
    order = [(up + 1) % 3, (up + 2) % 3][::-1 if down[up] > 0 else 1] + [up]  # right-handed, whichever way it points
    drawn = ranges[order]
    lengths = np.ptp(drawn, axis=1) / np.ptp(drawn, axis=1).prod() ** (1 / 3)  # as plotly draws the axes
    if down[up] > 0:
        drawn[2] = drawn[2, ::-1]
    towards = np.array((0.5, -1.3, 0.8) if lengths[0] > lengths[1] else (1.3, -0.5, 0.8))  # across a long scene
    digits = 5 - int(np.floor(np.log10(size)))  # a hundred thousandth of a camera
    return {"estimate": _rounded(corners[0], digits), "truth": _rounded(corners[1], digits),
            "training": None if training is None else _rounded(training[:, :3] - origin, digits),
            "order": order, "ranges": drawn.tolist(), "origin": origin.tolist(),
            "eye": (0.9 * np.linalg.norm(lengths) * towards).tolist()}


def _rounded(rows, digits):
    """Rows of numbers for JSON, None for those that are not finite."""
    return [row.round(digits).tolist() if np.isfinite(row).all() else None for row in rows]


def page(title, data):
    """The page as text. title: plain text. data: what the script of viewer.html reads."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from plotly.offline import get_plotlyjs

    # The end of plasma is too light for a white page.
    scale = [[x, to_hex(colormaps["plasma"](0.85 * x))] for x in np.linspace(0, 1, 11).round(1).tolist()]
    colours = {"estimate": COLOURS[1], "truth": "#999", "selected": COLOURS[2]}
    text = json.dumps({**data, "colourscale": scale, "colours": colours}, allow_nan=False)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    parts = {"title": html.escape(title), "plotly": get_plotlyjs(),
             "data": text.replace("<", "\\u003c")}  # no name can end the script
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def _arguments():
    """The command line. Raises UserError for paths that cannot be right."""
    parser = argparse.ArgumentParser(prog="python -m engine.viewer", description="Write a page to look at poses.")
    parser.add_argument("predictions", metavar="PREDICTIONS.csv", help="a file of --predictions_path, or a label file")
    parser.add_argument("output", metavar="OUT.html", nargs="?", help="(default: beside PREDICTIONS.csv)")
    parser.add_argument("--dataset_path", metavar="DIR", required=True, help="the folder that img_path is relative to")
    parser.add_argument("--convention", choices=CONVENTIONS,
                        help="whose convention the files' quaternions have: a dataset's, or that of labels of "
                             "prepare_colmap (camera-to-world, as 7Scenes) (default: what the JSON beside the label "
                             "files, or the names of the papers' scenes, say)")
    parser.add_argument("--labels_file", metavar="TRUE.csv", help="the frames' true poses, to be drawn")
    parser.add_argument("--training_labels", metavar="TRAIN.csv", help="training poses, to be drawn")
    parser.add_argument("--scene", metavar="NAME", help="the scene to draw, of several")
    args = parser.parse_args()
    args.output = args.output or str(Path(args.predictions).with_suffix(".html"))
    if not os.path.isdir(args.dataset_path):
        raise UserError(f"--dataset_path {args.dataset_path}: no such folder; "
                        "give the one that img_path is relative to")
    for path in (args.predictions, args.labels_file, args.training_labels):
        if path is not None and same_file(path, args.output):
            raise UserError(f"{args.output} is a file to read, which stays as it is; name another")
    return args


def _unit_of(args):
    """The unit of the files' positions. Raises UserError where they differ."""
    paths = [path for path in (args.labels_file, args.training_labels) if path] or [args.predictions]
    units = [read_unit(path) for path in paths]
    if len(set(units)) > 1:
        raise UserError(f"{paths[1]}: positions in {units[1]}, but in {units[0]} in {paths[0]}")
    return units[0]


def main():
    """Write the page that the command line asks for."""
    args = _arguments()
    table, scene = read_predictions(args.predictions, args.scene)
    poses, unit, convention = poses_of(table), _unit_of(args), args.convention
    if convention is None:
        paths = [path for path in (args.labels_file, args.training_labels, args.predictions) if path]
        scenes = [scene] if scene else read_labels(
            paths[0], ["img_path", *POSE_COLUMNS], optional=("scene",)).get("scene", ())
        convention = known_convention(paths, scenes)
    truth = read_truth(args.labels_file, table["img_path"].to_numpy()) if args.labels_file else None
    training = read_training(args.training_labels, scene) if args.training_labels else None
    if truth is not None:
        add_errors(table, truth)
    name, values, limit = colouring(table, unit)
    data = {"names": list(table["img_path"]), "hover": [html.escape(name) for name in table["img_path"]],
            "value_name": name, "values": [x if np.isfinite(x) else None for x in values.tolist()], "limit": limit,
            **scene_of(poses, truth, training, convention)}
    data["axes"] = [f"{axis} {-x:+.0f} [{unit}]" if x else f"{axis} [{unit}]"
                    for axis, x in zip("xyz", data.pop("origin"), strict=True)]
    data["labels"], data["texts"] = texts_of(table, truth, unit)
    data["images"] = read_thumbnails(args.dataset_path, data["names"])
    with whole_file(args.output, "wb") as file:
        file.write(page(Path(args.predictions).name, data).encode())
    n_true = 0 if truth is None else int(np.isfinite(truth).all(axis=1).sum())
    print(f"{args.output}: {len(table)} cameras, {n_true} with their true poses, "
          f"{f'coloured by {name}' if name else 'in one colour'}; {os.path.getsize(args.output) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
