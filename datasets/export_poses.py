"""Poses in the formats of other tools.

    python -m datasets.export_poses PREDICTIONS.csv OUT --format {tum,visloc,colmap,labels}
        [--convention {7Scenes,CambridgeLandmarks,colmap}] [--frames LABELS.csv] [--name_parts N] [--model SPARSE]

PREDICTIONS.csv is a label file, or what a script wrote with --predictions_path. With --frames its frames are counted as
in LABELS.csv: trajectories of the same frames then have the same times, whatever their order. Predictions of a video
have its times, unless --frames is given. The convention is that of the labels that the APR was trained on: quaternions
of 7Scenes and of prepare_colmap are camera-to-world, Cambridge's world-to-camera. The names of the papers' scenes tell
it, or a JSON beside the file (datasets.descriptions). Positions are the camera's in all. visloc names an image by its
file's name; --name_parts 2 keeps the folder before it, the camera's in some of the benchmark's datasets. colmap writes
a folder, a COLMAP model of images without points, with the intrinsics of the model in SPARSE; an image's name is
its whole path, as prepare_colmap has it from the model.
"""
import argparse
import os
import posixpath
import secrets
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from datasets.descriptions import describe, read_convention
from datasets.labels import POSE_COLUMNS, poses_of, read_labels, write_labels
from datasets.official import CONVENTIONS, agreed_convention
from datasets.prepare_colmap import find_model, read_model
from datasets.text_files import read_lines
from util import cli
from util.errors import UserError
from util.files import same_file, whole_file, writing

COLMAP_MARK = "# Poses written by datasets.export_poses"  # the first line of its files, by which it knows them
COLMAP_FILES = {  # {file of a COLMAP text model: what its lines are}
    "cameras.txt": "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]",
    "images.txt": "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME; then a line of points, empty here",
    "points3D.txt": "# No points",
}


def known_convention(paths, scenes):
    """The convention that files, or their scenes' names, tell. Raises UserError where nothing, or not one, is told."""
    known = agreed_convention({path: found for path in paths if (found := read_convention(path, scenes))})
    if known is None:
        raise UserError(f"{paths[0]}: nothing says whose convention its quaternions have; give --convention, which "
                        f"is {' or '.join(CONVENTIONS)}")
    return known


def camera_to_world(poses, convention):
    """Camera-to-world rotations (a scipy Rotation of N) and positions (N x 3) of poses in a convention (N x 7)."""
    rotations = Rotation.from_quat(np.roll(poses[:, 3:], -1, axis=1))  # scipy has the scalar last
    return rotations if CONVENTIONS[convention] else rotations.inv(), poses[:, :3]


def world_to_camera(poses, convention):
    """World-to-camera quaternions, scalar first, and translations (N x 7) of poses in a convention (N x 7)."""
    rotations, positions = camera_to_world(poses, convention)
    to_camera = rotations.inv()
    return np.hstack((np.roll(to_camera.as_quat(), 1, axis=1), -to_camera.apply(positions)))


def tum(table, convention, frames=None):
    """Lines of a TUM trajectory: time, position, quaternion x y z w, camera-to-world.

    The time is the frame's place, from 0, in the table, or among the names `frames`; without these the table's
    `time_s`, if it has this column. Raises UserError for a frame that is not among them, or appears twice, and for a
    time that is no number.
    """
    times = _times(table) if "time_s" in table else range(len(table))
    if frames is not None:
        places, names = {name: i for i, name in reversed(list(enumerate(frames)))}, table["img_path"]
        unknown = (f"is not in the file of --frames, which begins with '{frames.iloc[0]}': "
                   "these are poses of other frames, or their paths begin in another folder")
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


def _times(table):
    """A table's times: N seconds."""
    times = pd.to_numeric(table["time_s"], errors="coerce").to_numpy(float)
    for i in np.flatnonzero(~np.isfinite(times))[:1]:
        raise UserError(f"row {table['row'][i]}: time_s '{table['time_s'][i]}' is not a finite number")
    return times.tolist()


def visloc(table, convention, name_parts=1):
    """Lines of the visual localisation benchmark (visuallocalization.net): name qw qx qy qz tx ty tz, world-to-camera.

    The name is the last `name_parts` parts of the image's path. Raises UserError for names with spaces, and for two
    lines of one name.
    """
    names = _image_names(table, name_parts, "visloc")
    poses = world_to_camera(poses_of(table), convention)
    return [f"{name} {_numbers(pose)}" for name, pose in zip(names, poses, strict=True)]


def colmap(table, convention, cameras, known, name_parts=None):
    """A COLMAP text model of images without points, {file: lines}, and a summary of the images' cameras in words.

    The name is the last `name_parts` parts of the image's path (None: the whole path). An image of the model whose
    `cameras` and `known` images read_cameras returns keeps its name, id and camera from there. Other images have the
    next ids, and the model's camera if it has only one. Raises UserError for names with spaces, for two images of one
    name, and for images without a camera.
    """
    names = _image_names(table, name_parts, "colmap")
    others = [i for i, name in enumerate(names) if name not in known]
    only, example = next(iter(cameras)), next(image[1] for image in known.values())
    if others and len(cameras) > 1:
        parts = PurePosixPath(table["img_path"][others[0]]).parts
        n = next((n for n in range(len(parts), 0, -1) if "/".join(parts[-n:]) in known), None)
        remedy = f"set --name_parts {n}" if n else "name a model that has the image, or only one camera"
        raise UserError(f"row {table['row'][others[0]]}: the model has no image '{names[others[0]]}', and "
                        f"{len(cameras)} cameras that could be its own ({len(others)} of {len(names)}); its images "
                        f"have names such as '{example}'; {remedy}")
    next_id = 1 + max(image[0] for image in known.values())
    images = known | {names[i]: (next_id + n, names[i], only) for n, i in enumerate(others)}
    lines = []
    for name, pose in zip(names, world_to_camera(poses_of(table), convention), strict=True):
        image_id, name, camera_id = images[name]
        lines += [f"{image_id} {_exact(pose)} {camera_id} {name}", ""]
    summary = f"{len(names) - len(others)} with the cameras of their images in the model"
    if others:
        summary += (f"; {len(others)} with its only camera, since it has no image '{names[others[0]]}' (its images "
                    f"have names such as '{example}')")
    return {"cameras.txt": list(cameras.values()), "images.txt": lines, "points3D.txt": []}, summary


def read_cameras(folder):
    """The cameras and the registered images of a COLMAP model.

    Returns {camera's id: its line of cameras.txt} and {image's name, normalised: (its id, its name, its camera's id)}.
    Raises UserError as prepare_colmap.read_model does.
    """
    folder = find_model(folder)
    registered = {name for name, _ in read_model(folder)}
    if all((folder / name).with_suffix(".bin").is_file() for name in COLMAP_FILES):  # as read_model chooses
        import pycolmap

        model = pycolmap.Reconstruction(folder)
        cameras = {i: f"{i} {camera.model.name} {camera.width} {camera.height} {_exact(camera.params)}"
                   for i, camera in sorted(model.cameras.items())}
        images = [(i, image.name, image.camera_id) for i, image in model.images.items()]
    else:  # pycolmap may miss images here, see prepare_colmap
        lines = [line for line in read_lines(folder / "cameras.txt") if line and not line.startswith("#")]
        cameras = {int(line.split()[0]): line for line in lines}
        rows = [line.split(maxsplit=9) for line in read_lines(folder / "images.txt") if not line.startswith("#")]
        images = [(int(row[0]), row[9], int(row[8])) for row in rows if len(row) == 10 and row[9] in registered]
    return cameras, {posixpath.normpath(image[1]): image for image in sorted(images) if image[1] in registered}


def _image_names(table, name_parts, form):
    """The names of a table's images: the last `name_parts` parts of their paths (None: the whole path).

    Raises UserError for names with spaces, and for two images of one name. form: the format, for these messages.
    """
    names = ["/".join(PurePosixPath(path).parts[-(name_parts or 0):]) for path in table["img_path"]]
    first = {}  # {name: its first place}
    for i, (name, path) in enumerate(zip(names, table["img_path"], strict=True)):
        if len(name.split()) != 1:
            raise UserError(f"row {table['row'][i]}: img_path '{path}' has a space in its name '{name}', where {form} "
                            "would cut it; rename it")
        j = first.setdefault(name, i)
        if j != i:
            longer = posixpath.normpath(table["img_path"][j]) != posixpath.normpath(path)
            remedy = f"raise --name_parts above {name_parts}" if longer else "delete one of the rows"
            raise UserError(f"rows {table['row'][j]} and {table['row'][i]}: both images have the name '{name}', and "
                            f"{form} has one line per name; {remedy}")
    return names


def _exact(values):
    """Numbers as text, to the last bit."""
    return " ".join(map(repr, np.asarray(values, dtype=float).tolist()))


def _numbers(values):
    """Numbers as text."""
    return " ".join(f"{value:.9f}" for value in values)


def _name_parts(text):
    """The value of --name_parts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _is_ours(folder):
    """Whether a folder is empty, or holds only files of a COLMAP model that this module wrote."""
    if not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    return set(names) <= set(COLMAP_FILES) and all(COLMAP_MARK in read_lines(Path(folder) / name)[:1] for name in names)


def _write_colmap(folder, files):
    """Write a COLMAP text model, {file: lines}, as a folder that is replaced or appears completely, or not at all."""
    target = Path(os.path.realpath(folder))  # a link stays
    part, old = (target.with_name(f"{target.name}.{secrets.token_hex(4)}.{kind}") for kind in ("part", "old"))
    try:
        for name, lines in files.items():
            with whole_file(part / name) as file:
                file.writelines(f"{line}\n" for line in (COLMAP_MARK, COLMAP_FILES[name], *lines))
        with writing(folder):
            if target.exists():
                os.rename(target, old)
            os.rename(part, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def _arguments():
    """The command line. Raises UserError for arguments that exclude each other."""
    parser = argparse.ArgumentParser(prog="python -m datasets.export_poses",
                                     description="Write poses in the format of another tool.")
    parser.add_argument("predictions", metavar="PREDICTIONS.csv", help="a file of --predictions_path, or a label file")
    parser.add_argument("output", metavar="OUT", help="the file to write; colmap: the folder")
    parser.add_argument("--format", required=True, choices=("tum", "visloc", "colmap", "labels"),
                        help="tum: a trajectory (for evo), as time time_s or else the frame's place in the file, "
                             "camera-to-world, quaternion x y z w; visloc: name qw qx qy qz tx ty tz, world-to-camera; "
                             "colmap: a COLMAP text model of images without points; labels: a label file (not for "
                             "poses of predict, which have no scenes)")
    parser.add_argument("--convention", choices=CONVENTIONS,
                        help="whose convention the file's quaternions have: a dataset's, or that of labels of "
                             "prepare_colmap (camera-to-world, as 7Scenes) (default: what the names of the papers' "
                             "scenes, or the JSON beside the file, say)")
    parser.add_argument("--frames", metavar="LABELS.csv",
                        help="tum: count the frames as in this file, so that trajectories of the same frames have the "
                             "same times (default: as in PREDICTIONS.csv)")
    parser.add_argument("--name_parts", metavar="N", type=_name_parts,
                        help="visloc, colmap: the last N parts of an image's path are its name; 2 keeps the file's "
                             "folder (default: 1; colmap: the whole path)")
    parser.add_argument("--model", metavar="SPARSE",
                        help="colmap: the COLMAP model whose cameras the images have, such as sparse/0: each its own, "
                             "or, where the model lacks the image, the only one")
    args = parser.parse_args()
    if args.frames and args.format != "tum":
        raise UserError(f"--frames is for tum, which counts frames; leave it out with {args.format}")
    if args.name_parts and args.format not in ("visloc", "colmap"):
        raise UserError(f"--name_parts is for visloc and colmap, which name images; leave it out with {args.format}")
    if args.model is not None and args.format != "colmap":
        raise UserError(f"--model is for colmap, which needs cameras; leave it out with {args.format}")
    if args.model is None and args.format == "colmap":
        raise UserError("--format colmap needs --model: the folder of the COLMAP model whose cameras the images have, "
                        "such as sparse/0")
    for path, use in ((args.predictions, "file to convert"), (args.frames, "file to count the frames by"),
                      (args.model and find_model(args.model), "model to take the cameras from")):
        if path is not None and same_file(path, args.output):
            raise UserError(f"{args.output} is the {use}, which stays as it is; name another")
    if args.format == "colmap" and os.path.lexists(args.output) and not _is_ours(args.output):
        raise UserError(f"{args.output}: exists, and is not a model that export_poses wrote; name another folder")
    return args


def main():
    """Write the file or folder that the command line asks for."""
    args = _arguments()
    columns, summary = ["img_path", *POSE_COLUMNS], ""
    optional = ("time_s", "scene", "predicted_scene")
    table = read_labels(args.predictions, *([] if args.format == "labels" else [columns, optional]))
    if args.format != "labels":
        scenes = next((table[column] for column in ("scene", "predicted_scene") if column in table), ())
        args.convention = args.convention or known_convention([args.predictions], scenes)
    frames = read_labels(args.frames, columns)["img_path"] if args.frames else None
    model = read_cameras(args.model) if args.format == "colmap" else None
    try:
        if args.format == "colmap":
            files, summary = colmap(table, args.convention, *model, args.name_parts)
        elif args.format == "visloc":
            lines = visloc(table, args.convention, args.name_parts or 1)
        elif args.format == "tum":
            lines = tum(table, args.convention, frames)
    except UserError as error:
        raise UserError(f"{args.predictions}: {error}") from error
    if args.format == "colmap":
        _write_colmap(args.output, files)
    elif args.format == "labels":
        convention = {"convention": args.convention} if args.convention else {}
        write_labels(args.output, table, {**describe(args.predictions), **convention})
    else:
        with whole_file(args.output) as file:
            file.write("\n".join(lines) + "\n")
    print(f"{args.output}: {len(table)} poses" + (f", {summary}" if summary else ""))


if __name__ == "__main__":
    cli.run(main)
