"""Poses in the formats of other tools.

    python -m datasets.export_poses PREDICTIONS.csv OUT --format {tum,visloc,labels}
        --convention {7Scenes,CambridgeLandmarks} [--frames LABELS.csv] [--name_parts N]

PREDICTIONS.csv is a label file, or what a script wrote with --predictions_path. With --frames its frames are counted as
in LABELS.csv: trajectories of the same frames then have the same times, whatever their order. The convention is that of
the labels that the APR was trained on: 7Scenes' quaternions are camera-to-world, Cambridge's world-to-camera. Positions
are the camera's in both. visloc names an image by its file's name; --name_parts 2 keeps the folder before it, which is
the camera's in some of the benchmark's datasets.
"""
import argparse
import posixpath
from pathlib import PurePosixPath

import numpy as np
from scipy.spatial.transform import Rotation

from datasets.labels import POSE_COLUMNS, poses_of, read_labels, write_labels
from datasets.official import DATASETS
from util import cli
from util.errors import UserError
from util.files import same_file, whole_file

CONVENTIONS = {name: dataset.camera_to_world for name, dataset in DATASETS.items()}


def camera_to_world(poses, convention):
    """Camera-to-world rotations (a scipy Rotation of N) and positions (N x 3) of poses in a convention (N x 7)."""
    rotations = Rotation.from_quat(np.roll(poses[:, 3:], -1, axis=1))  # scipy has the scalar last
    return rotations if CONVENTIONS[convention] else rotations.inv(), poses[:, :3]


def tum(table, convention, frames=None):
    """Lines of a TUM trajectory: time, position, quaternion x y z w, camera-to-world.

    The time is the frame's place, from 0, in the table, or among the names `frames`. Raises UserError for a frame that
    is not among them, or appears twice.
    """
    times = range(len(table))
    if frames is not None:
        places, names = {name: i for i, name in reversed(list(enumerate(frames)))}, table["img_path"]
        unknown = (f"is not in the file of --frames, which begins with '{frames.iloc[0]}': "
                   "these are poses of other frames")
        for rows, problem in ((~names.isin(places), unknown), (names.duplicated(), "appears twice, but has one time")):
            if rows.any():
                i = int(rows.to_numpy().argmax())
                raise UserError(f"row {table['row'][i]}: img_path '{names[i]}' {problem} "
                                f"({rows.sum()} of {len(names)})")
        times = [places[name] for name in names]
    rotations, positions = camera_to_world(poses_of(table), convention)
    poses = np.hstack((positions, rotations.as_quat()))
    lines = sorted(zip(times, poses, strict=True), key=lambda line: line[0])
    return [f"{time} {_numbers(pose)}" for time, pose in lines]


def visloc(table, convention, name_parts=1):
    """Lines of the visual localisation benchmark (visuallocalization.net): name qw qx qy qz tx ty tz, world-to-camera.

    The name is the last `name_parts` parts of the image's path. Raises UserError for names with spaces, and for two
    lines of one name.
    """
    names = ["/".join(PurePosixPath(path).parts[-name_parts:]) for path in table["img_path"]]
    first = {}  # {name: its first place}
    for i, (name, path) in enumerate(zip(names, table["img_path"], strict=True)):
        if len(name.split()) != 1:
            raise UserError(f"row {table['row'][i]}: img_path '{path}' has a space in its name '{name}', which visloc "
                            "has between numbers; rename it")
        j = first.setdefault(name, i)
        if j != i:
            longer = posixpath.normpath(table["img_path"][j]) != posixpath.normpath(path)
            remedy = f"raise --name_parts above {name_parts}" if longer else "delete one of the rows"
            raise UserError(f"rows {table['row'][j]} and {table['row'][i]}: both images have the name '{name}', and "
                            f"visloc has one line per name; {remedy}")
    rotations, positions = camera_to_world(poses_of(table), convention)
    to_camera = rotations.inv()
    poses = np.hstack((np.roll(to_camera.as_quat(), 1, axis=1), -to_camera.apply(positions)))
    return [f"{name} {_numbers(pose)}" for name, pose in zip(names, poses, strict=True)]


def _numbers(values):
    """Numbers as text."""
    return " ".join(f"{value:.9f}" for value in values)


def _name_parts(text):
    """The value of --name_parts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _arguments():
    """The command line. Raises UserError for arguments that exclude each other."""
    parser = argparse.ArgumentParser(prog="python -m datasets.export_poses",
                                     description="Write poses in the format of another tool.")
    parser.add_argument("predictions", metavar="PREDICTIONS.csv", help="a file of --predictions_path, or a label file")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--format", required=True, choices=("tum", "visloc", "labels"),
                        help="tum: a trajectory (for evo), the frame's place in the file as time, camera-to-world, "
                             "quaternion x y z w; visloc: name qw qx qy qz tx ty tz, world-to-camera; labels: a label "
                             "file (not for poses of predict, which have no scenes)")
    parser.add_argument("--convention", required=True, choices=CONVENTIONS,
                        help="the dataset whose convention the file's quaternions have")
    parser.add_argument("--frames", metavar="LABELS.csv",
                        help="tum: count the frames as in this file, so that trajectories of the same frames have the "
                             "same times (default: as in PREDICTIONS.csv)")
    parser.add_argument("--name_parts", metavar="N", type=_name_parts,
                        help="visloc: the last N parts of an image's path are its name; 2 keeps the file's folder "
                             "(default: 1)")
    args = parser.parse_args()
    if args.frames and args.format != "tum":
        raise UserError(f"--frames is for tum, which counts frames; leave it out with {args.format}")
    if args.name_parts and args.format != "visloc":
        raise UserError(f"--name_parts is for visloc, which names images; leave it out with {args.format}")
    for path in filter(None, (args.predictions, args.frames)):
        if same_file(path, args.output):
            use = "convert" if path == args.predictions else "count the frames by"
            raise UserError(f"{args.output} is the file to {use}, which stays as it is; name another")
    return args


def main():
    """Write the file that the command line asks for."""
    args = _arguments()
    if args.format == "labels":
        table = read_labels(args.predictions)
        write_labels(args.output, table)
    else:
        table = read_labels(args.predictions, ["img_path", *POSE_COLUMNS])
        frames = read_labels(args.frames, ["img_path", *POSE_COLUMNS])["img_path"] if args.frames else None
        try:
            lines = (visloc(table, args.convention, args.name_parts or 1) if args.format == "visloc"
                     else tum(table, args.convention, frames))
        except UserError as error:
            raise UserError(f"{args.predictions}: {error}") from error
        with whole_file(args.output) as file:
            file.write("\n".join(lines) + "\n")
    print(f"{args.output}: {len(table)} poses")


if __name__ == "__main__":
    cli.run(main)
