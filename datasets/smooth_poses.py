"""Predicted poses of a walk, smoothed over its frames.

    python -m datasets.smooth_poses PREDICTIONS.csv OUT.csv [--causal] [--labels TRUE.csv]
        [--position_noise M] [--orientation_noise DEG]

PREDICTIONS.csv is what a script wrote with --predictions_path. Each folder of img_path is a walk, whose frames are in
the natural order of their names and evenly spaced; a column time_s gives other times, in seconds. A Rauch-Tung-Striebel
smoother takes the frames before and after each frame, and --causal the Kalman filter alone those before: see
util/smoothing.py. Frames without a pose (`rejected`) get one.

Frames with larger expected errors, or without these with larger novelty, count less. Only the proportions matter:
expected errors include what neighbouring frames have in common, which no smoothing removes. How noisy a median frame
is, and how fast the camera's velocity changes, are estimated from all frames of a scene.
"""
import argparse
import os
from collections import defaultdict

import numpy as np
import pandas as pd
import torch

from datasets.descriptions import read_unit
from datasets.labels import (
    EXPECTED_COLUMNS,
    POSE_COLUMNS,
    natural_key,
    parse_frame,
    poses_of,
    read_labels,
    read_table,
    to_number,
    write_labels,
)
from util import cli
from util.errors import UserError, first_five
from util.files import same_file
from util.metrics import changes, format_medians, pose_err
from util.smoothing import fit, smooth
from util.units import in_unit, set_unit

ERROR_COLUMNS = ["position_error_m", "orientation_error_deg"]
RELATIVE = 1 / 4, 4  # the least and the greatest noise of a frame, over that of a median one


def read_predictions(path):
    """Read a file of predictions: a table with all its columns as text, and `row`; and the poses, N x 7.

    A frame without a pose, or `rejected`, has NaN. Raises UserError, with the file and the row, as read_labels does,
    and for a file without any pose and for one that is smoothed already.
    """
    header, lines = read_table(path, ["img_path", *POSE_COLUMNS])
    if "smoothed" in header:
        raise UserError(f"{path}: has a column 'smoothed': its poses are smoothed already; name the predictions")
    problems, poses = [], np.full((len(lines), 7), np.nan)
    for i, (row, cells) in enumerate(lines):
        named = dict(zip(header, cells))
        frame = {column: named[column] for column in ("img_path", *POSE_COLUMNS)}
        empty = named.get("rejected") == "True" or not any(named[column] for column in POSE_COLUMNS)
        if empty:
            frame |= dict.fromkeys(POSE_COLUMNS, "1")
        values, problem = parse_frame(frame)
        if any(cells[len(header):]):
            problem = f"{len(cells)} cells, but the header has {len(header)}"
        if problem:
            problems.append(f"row {row}: {problem}")
        elif not empty:
            poses[i] = values[1:]
    if problems:
        raise UserError(f"{path}: {first_five(problems)}")
    if not np.isfinite(poses).any():
        raise UserError(f"{path}: no frame has a pose; at least one is needed")
    table = pd.DataFrame([cells[:len(header)] for _, cells in lines], columns=header)
    return table.assign(row=[row for row, _ in lines]), poses


def numbers(path, table, column):
    """A column of a table of read_predictions as floats, NaN where it is empty. Raises UserError for other texts."""
    values = []
    for row, cell in zip(table["row"], table[column]):
        try:
            values.append(to_number(cell or "nan"))
        except ValueError as error:
            raise UserError(f"{path}: row {row}: {column} '{cell}' is not a number") from error
    return np.array(values)


def walks_of(path, table):
    """The walks of a table of read_predictions, in order of time.

    Returns {(scene, predicted scene): [(positions in the table, times)]}, with '' for what the table lacks. A walk is
    a folder. Poses that a multi-scene model has predicted in another scene have other coordinates, and are walks of
    their own. Raises UserError for an image listed twice, and for two frames of a walk at one time.
    """
    times = numbers(path, table, "time_s") if "time_s" in table else None
    if times is not None and not np.isfinite(times).all():
        row = table["row"][int(np.flatnonzero(~np.isfinite(times))[0])]
        raise UserError(f"{path}: row {row}: time_s is empty or not finite; each frame needs a time, or none has one")
    names = table["img_path"].map(os.path.normpath)
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        first, second, *_ = table["row"][names == name]
        raise UserError(f"{path}: rows {first} and {second}: image '{name}' is listed twice; delete one")
    scenes = {column: table[column] if column in table else pd.Series("", index=table.index)
              for column in ("scene", "predicted_scene")}
    walks = defaultdict(list)
    for (scene, _), frames in table.groupby([scenes["scene"], names.map(os.path.dirname)], sort=False).indices.items():
        keys = names.map(natural_key) if times is None else times
        frames = np.array(sorted(frames, key=lambda i: keys[i]))
        at = np.arange(len(frames), dtype=float) if times is None else times[frames]
        if (np.diff(at) <= 0).any():
            k = int(np.flatnonzero(np.diff(at) <= 0)[0])
            first, second = table["row"][frames[k]], table["row"][frames[k + 1]]
            raise UserError(f"{path}: rows {first} and {second}: two frames of a folder have one time_s, {at[k]:g}")
        predicted = scenes["predicted_scene"][frames].to_numpy()
        for name in dict.fromkeys(predicted):
            walks[scene, name].append((frames[predicted == name], at[predicted == name]))
    return walks


def relative_noise(path, table):
    """Each frame's noise over a median frame's, N x 2 (position, orientation), and in words what tells it."""
    if set(EXPECTED_COLUMNS) <= set(table):
        columns, source = EXPECTED_COLUMNS, "expected errors"
    elif "novelty" in table:
        columns, source = ["novelty"] * 2, "novelty"
    else:
        return np.ones((len(table), 2)), "weighed alike"
    values = np.stack([numbers(path, table, column) for column in columns], axis=1)
    missing = np.isnan(values)
    if missing.all(axis=0).any():
        return np.ones((len(table), 2)), f"weighed alike, since the columns of {source} are empty"
    ratios = np.clip(values / np.maximum(np.nanmedian(values, axis=0), 1e-12), *RELATIVE)
    n = missing.any(axis=1).sum()
    return np.where(missing, 1, ratios), f"weighed by {source}" + (f"; {n} without, taken as median ones" if n else "")


def smooth_walks(poses, walks, relative, given=(None, None), causal=False):
    """Return smoothed poses, N x 7, NaN where a frame has none; N, whether a frame's own was used; and the noise.

    poses: N x 7. walks: of walks_of. relative: N x 2, of relative_noise. given: standard deviations of the noise along
    an axis, metres and degrees, or None where it is to be estimated. noise: {scene: these standard deviations}.
    """
    known, noise = np.isfinite(poses).all(axis=1), {}
    smoothed, used = np.full_like(poses, np.nan), np.zeros(len(poses), bool)
    given = given[0], given[1] and np.radians(given[1])
    for scene, parts in walks.items():
        parts = [(frames, times) for frames, times in parts if known[frames].any()]
        if not parts:
            continue
        with_pose = [(frames[known[frames]], times[known[frames]]) for frames, times in parts]
        variances, *dynamics = fit([(poses[frames], times, relative[frames]) for frames, times in with_pose], given)
        noise[scene] = np.sqrt(variances) * (1, 180 / np.pi)
        for frames, times in parts:
            of_frames = variances * np.square(relative[frames])
            smoothed[frames], used[frames] = smooth(poses[frames], times, of_frames, *dynamics, causal)
    return smoothed, used, noise


def smoothed_table(table, poses, smoothed, used, smoother):
    """The table to write, in which each column is true of the smoothed poses, and lines that say what changed.

    table, poses: of read_predictions. smoothed, used: of smooth_walks. smoother: 'smoother' or 'filter'.
    """
    known, found = np.isfinite(poses).all(axis=1), np.isfinite(smoothed).all(axis=1)
    stale = [column for column in (*ERROR_COLUMNS, *EXPECTED_COLUMNS) if column in table]
    table = table.drop(columns=stale)
    table[POSE_COLUMNS] = smoothed
    table["smoothed"] = smoother
    table["measured"] = np.where(used, "used", np.where(known, "gated", "missing"))
    if "rejected" in table or not found.all():
        table["rejected"] = ~found
    lines = [f"{len(poses)} frames: {used.sum()} poses used, {(known & ~used).sum()} gated as outliers, "
             f"{(found & ~known).sum()} of {(~known).sum()} frames without a pose bridged"]
    if stale:
        lines.append(f"left out, since they are of single frames: {', '.join(stale)}")
    return table, lines


def compare(table, poses, walks, labels_file):
    """Put the true errors of smoothed poses into a table, and return lines that compare them with those before.

    table: of smoothed_table. poses: before smoothing, N x 7. walks: of walks_of. Raises UserError where no frame is in
    the label file.
    """
    labels = read_labels(labels_file)
    truth = dict(zip(labels["img_path"].map(os.path.normpath), poses_of(labels)))
    names = table["img_path"].map(os.path.normpath)
    there = names.isin(truth).to_numpy()
    if not there.any():
        raise UserError(f"{labels_file}: has none of the frames, such as '{names[0]}'; its own are such as "
                        f"'{labels['img_path'][0]}'")
    true = torch.tensor(np.array([truth.get(name, [np.nan] * 7) for name in names]))
    before, after = (np.stack(pose_err(torch.tensor(each), true)) for each in (poses, table[POSE_COLUMNS].to_numpy()))
    table[ERROR_COLUMNS] = after.T
    order = np.concatenate([frames for parts in walks.values() for frames, _ in parts])
    both = order[np.isfinite(before + after)[:, order].all(axis=0)]
    bridged = np.isfinite(after).all(axis=0) & ~np.isfinite(poses).all(axis=1)
    lines = [] if there.all() else [f"{(~there).sum()} of {len(there)} frames are not in {labels_file}"]
    if len(both):
        lines.append(f"median pose error {format_medians(np.median(after[:, both], axis=1))}; of the same "
                     f"{len(both)} frames singly {format_medians(np.median(before[:, both], axis=1))}")
        for name, (change, low, high) in zip(("position", "orientation"), changes(before[:, both], after[:, both])):
            interval = f"95% interval {low:+.1f}% to {high:+.1f}%" if np.isfinite(low) else "too few frames for one"
            lines.append(f"change of the median {name} error {change:+.1f}% ({interval})")
    if bridged.any():
        lines.append(f"median pose error of {bridged.sum()} bridged frames "
                     f"{format_medians(np.median(after[:, bridged], axis=1))}")
    return [in_unit(line) for line in lines]


def _positive(text):
    """The value of --position_noise and --orientation_noise."""
    try:
        value = to_number(text)
    except ValueError:
        value = -1
    if not 0 < value < 1e30:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def _arguments():
    """The command line. Raises UserError for an output that is an input."""
    parser = argparse.ArgumentParser(prog="python -m datasets.smooth_poses",
                                     description="Smooth the predicted poses of walks over neighbouring frames.")
    parser.add_argument("predictions", metavar="PREDICTIONS.csv", help="a file of --predictions_path")
    parser.add_argument("output", metavar="OUT.csv", help="the same with smoothed poses, marked as such")
    parser.add_argument("--causal", action="store_true",
                        help="use earlier frames only: a Kalman filter (default: later ones too, an RTS smoother)")
    parser.add_argument("--labels", metavar="TRUE.csv", help="true poses, to measure what is gained (default: none)")
    parser.add_argument("--position_noise", metavar="M", type=_positive,
                        help="standard deviation of a median frame's position along an axis, in the unit of the "
                             "predictions (default: estimated)")
    parser.add_argument("--orientation_noise", metavar="DEG", type=_positive,
                        help="the same of its orientation, in degrees (default: estimated)")
    args = parser.parse_args()
    for path in filter(None, (args.predictions, args.labels)):
        if same_file(path, args.output):
            raise UserError(f"{args.output} is an input, which stays as it is; name another")
    return args


def main():
    """Write the smoothed poses that the command line asks for."""
    args = _arguments()
    smoother = "filter" if args.causal else "smoother"
    if args.labels:
        set_unit(read_unit(args.labels))
    table, poses = read_predictions(args.predictions)
    walks, (relative, source) = walks_of(args.predictions, table), relative_noise(args.predictions, table)
    given = args.position_noise, args.orientation_noise
    smoothed, used, noise = smooth_walks(poses, walks, relative, given, args.causal)
    table, lines = smoothed_table(table, poses, smoothed, used, smoother)
    lines.append(f"frames {source}")
    estimated = "as given" if None not in given else "estimated from all of these frames, later ones too"
    for scene, (position, orientation) in noise.items():
        name = "/".join(filter(None, dict.fromkeys(scene))) or "all frames"
        lines.append(in_unit(f"{name}, walks: {len(walks[scene])}, noise along an axis: {position:.3g}[m], "
                             f"{orientation:.3g}[deg] ({estimated})"))
    if args.labels:
        lines += compare(table, poses, walks, args.labels)
    write_labels(args.output, table)
    for line in lines:
        print(f"{args.output}: {smoother} with neighbouring frames: {line}")


if __name__ == "__main__":
    cli.run(main)
