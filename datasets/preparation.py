"""What the prepare commands share.

prepare_7scenes and prepare_cambridge: arguments, scenes from folders or archives, and label files. prepare_colmap and
prepare_photos: the split, the scale, the label files and the next commands of a scene of one's own.
"""
import argparse
import shlex
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation

from datasets.archives import unpack, unpack_inner
from datasets.downloads import download
from datasets.labels import COLUMNS, natural_key, to_number, write_labels
from datasets.text_files import reading
from util.errors import UserError

NO_FOLDER = "seq-01"  # the sequence of images outside any folder
N_STRETCHES, TEST_STRETCH = 10, 5  # of ten stretches of images every fifth is for testing
MIN_REMEMBERED = 32  # training frames of a scene, for a PAE to refine and to tell novelty: latent_memory.MIN_FRAMES
GAP = 0.02  # of the images, between a training and a test stretch


def parse_arguments(module, dataset, flags=None):
    """The command line of a dataset's command.

    module: the command's name. dataset: an OfficialDataset. flags: {flag of this command alone: its help}.
    Returns a namespace: dataset_path, download, yes, url, scenes (a list or None), labels_path, and the flags. Raises
    UserError for arguments that exclude each other.
    """
    parser = argparse.ArgumentParser(prog=f"python -m datasets.{module}",
                                     description=f"Turn the official download of {dataset.name} into label files.")
    parser.add_argument("dataset_path", metavar="DATASET_PATH",
                        help="the folder of the scenes' folders; official archives in it whose scenes have no folder "
                             "yet are unpacked, and kept")
    parser.add_argument("--download", action="store_true", help="fetch the scenes that are missing (default: no)")
    parser.add_argument("--yes", action="store_true", help="agree to the dataset's licence without being asked")
    parser.add_argument("--url", metavar="BASE", default=dataset.url,
                        help=f"where to download from (default: {dataset.url})")
    parser.add_argument("--scenes", metavar="NAME", nargs="+",
                        help="the scenes to prepare (default: all scenes in the folder; with --download all official "
                             f"ones: {', '.join(dataset.archives)})")
    parser.add_argument("--labels_path", metavar="DIR", default=f"datasets/{dataset.name}",
                        help=f"the folder to write label files to (default: datasets/{dataset.name})")
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    args = parser.parse_args()
    if args.url != dataset.url and not args.download:
        raise UserError("--url is for --download; add that, or leave --url out")
    if not args.url.startswith(("http://", "https://")):
        raise UserError(f"--url {args.url}: must begin with http:// or https://")
    if args.scenes:
        args.scenes = list(dict.fromkeys(args.scenes))  # each once
    for scene in args.scenes or []:
        if "/" in scene or scene in ("", ".", ".."):
            raise UserError(f"--scenes {scene}: give a folder's name, not a path")
        if args.download and scene not in dataset.archives:
            raise UserError(f"--scenes {scene}: no scene to download; choose from {', '.join(dataset.archives)}")
    return args


def get_scenes(args, dataset, is_scene, inner=None):
    """Download and unpack missing scenes. Returns the names of the scenes to prepare, sorted.

    args: those of parse_arguments. dataset: an OfficialDataset. is_scene: says of a folder whether it is a scene's.
    inner: the pattern of archives in a scene's folder that are to be unpacked in place, such as 'seq-*.zip'.
    """
    root = Path(args.dataset_path)
    wanted = args.scenes or (list(dataset.archives) if args.download else [])
    absent = [scene for scene in wanted if not (root / scene).exists() and not (root / f"{scene}.zip").exists()]
    if args.download and absent:
        _ask_for_consent(dataset, absent, args.yes)
    elif not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one of the scenes' folders, or add --download")
    elif absent:
        raise UserError(f"--scenes {absent[0]}: no such folder in {root}, and no archive {absent[0]}.zip")

    for scene in wanted or dataset.archives:
        archive = root / f"{scene}.zip"
        if scene in absent:
            download(f"{args.url.rstrip('/')}/{dataset.archives[scene]}", archive)
        if archive.exists() and not (root / scene).exists():
            unpack(archive, root / scene, inner)
    if not wanted:
        with reading(root):
            wanted = [path.name for path in root.iterdir()
                      if path.is_dir() and not path.name.startswith(".") and path.suffix != ".part" and is_scene(path)]
    if not wanted:
        raise UserError(f"{root}: holds no scene; it must hold the scenes' folders or archives, or add --download")
    if inner:
        for scene in wanted:
            unpack_inner(root / scene, inner)
    return sorted(wanted)


def write_label_files(args, dataset, tables):
    """Write one label file per scene and split and, without --scenes, one with the training frames of all scenes.

    args: those of parse_arguments. dataset: an OfficialDataset. tables: {scene: {split: DataFrame with
    labels.COLUMNS}}. The file of all scenes has the papers' scenes; where none of them is prepared, it has all that
    are.
    """
    files = {dataset.label_file(scene, split): table
             for scene in sorted(tables) for split, table in tables[scene].items()}
    together = [scene for scene in sorted(tables) if scene in dataset.scenes] or sorted(tables)
    if not args.scenes:
        files[dataset.all_scenes_file] = pd.concat([tables[scene]["train"] for scene in together])
    for name, table in files.items():
        path = Path(args.labels_path) / name
        write_labels(path, table, {"unit": "m", "convention": dataset.name})
        print(f"{path}: {len(table)} frames")
    if args.scenes:
        print(f"{dataset.all_scenes_file} is written when all scenes are prepared, without --scenes")
    elif set(together) != set(dataset.scenes):
        print(f"{dataset.all_scenes_file} has {', '.join(together)}, not {', '.join(dataset.scenes)}: "
              "scene indices are ranks among its scenes")


def _ask_for_consent(dataset, scenes, yes):
    """Name the licence and ask once. Raises UserError unless the answer is yes."""
    print(f"{dataset.title} has a licence of its own: {dataset.licence}", flush=True)
    if yes:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise UserError(f"--download: without a terminal you cannot be asked whether you agree to the licence, "
                        f"{dataset.licence}; if you do, add --yes")
    try:
        answer = input(f"Do you agree to it, and download {', '.join(scenes)}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("--download: nothing is downloaded unless you agree to the licence; answer y, or add --yes")


def add_split(parser):
    """Add --every to a parser."""
    parser.add_argument("--every", metavar="N", type=_every,
                        help=f"every N-th image of a sequence is for testing (default: the images, in the order of "
                             f"their names, are cut into {N_STRETCHES} stretches; every fifth is for testing, and "
                             f"images next to it are left out)")


def add_scale_by(parser):
    """Add --scale_by to a parser."""
    parser.add_argument("--scale_by", metavar=("IMG_A", "IMG_B", "METRES"), nargs=3,
                        help="two images and the distance in metres between the places that they were taken from, to "
                             "scale the model by (default: positions have the model's unit)")


def _every(text):
    """The value of --every."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 2")
    return int(text)


def check_scene_name(flag, name, folder):
    """The scene's name: that of the folder without `name`, which `flag` gave. Raises UserError for an unusable one."""
    name = Path(folder).resolve().name if name is None else name
    if not name.strip() or "/" in name:
        raise UserError(f"{flag} '{name}': not a scene's name; it becomes part of the files' names")
    return name


def metres_of(scale_by):
    """The distance in metres of --scale_by, (image, image, text). Raises UserError for a text that is none."""
    with suppress(ValueError):
        if 0 < to_number(scale_by[2]) < float("inf"):
            return to_number(scale_by[2])
    raise UserError(f"--scale_by: '{scale_by[2]}' is no distance in metres; give a number above 0")


def scale_between(frames, scale_by):
    """Metres per unit of frames, a list of (image name, pose), by --scale_by, (image, image, metres as text).

    Raises UserError for an image that is not among the frames, and for a distance that gives no scale.
    """
    image_a, image_b, _ = scale_by
    positions = dict(frames)
    for image in (image_a, image_b):
        if image not in positions:
            raise UserError(f"--scale_by {image}: not among the {len(frames)} images that the model has placed, such "
                            f"as {min(positions, key=natural_key)}")
    in_model = np.linalg.norm(np.subtract(positions[image_a][:3], positions[image_b][:3]))
    extent = np.linalg.norm(np.ptp([pose[:3] for _, pose in frames], axis=0))
    if in_model <= 1e-3 * extent:  # the model's own error may be as large
        raise UserError(f"--scale_by {image_a} {image_b}: the two were taken from one place; give two images that are "
                        f"far apart")
    return metres_of(scale_by) / in_model


def scaled(frames, scale):
    """Frames, a list of (image name, pose), with their positions multiplied by a number."""
    return [(name, [*(scale * x for x in pose[:3]), *pose[3:]]) for name, pose in frames]


def label_table(frames, scene, split):
    """The labels of a scene: a DataFrame with labels.COLUMNS, in the order of sequences and frames.

    frames: a list of (image name, pose of 7 numbers).
    split: a function from the frames' sequences, in that order, to 'train', 'test' or '' (left out) for each.
    """
    ordered = sorted(((sequence_of(name), name, pose) for name, pose in frames),
                     key=lambda frame: (natural_key(frame[0]), natural_key(frame[1])))
    splits = split([sequence for sequence, _, _ in ordered])
    return pd.DataFrame([[scene, part, sequence, name, *pose]
                         for part, (sequence, name, pose) in zip(splits, ordered, strict=True)], columns=COLUMNS)


def sequence_of(name):
    """The sequence of an image: its folder."""
    folder = str(PurePosixPath(name).parent)
    return NO_FOLDER if folder == "." else folder


def split_stretches(sequences):
    """'train', 'test', or '' for left out, of each frame: whole stretches are for testing.

    A test frame between two training frames would be near to both, and the errors smaller than on another walk. So
    stretches are apart, and training frames next to a test stretch are left out.
    """
    n = len(sequences)
    is_test = np.arange(n) * N_STRETCHES // n % TEST_STRETCH == TEST_STRETCH - 1
    near_test = binary_dilation(is_test, iterations=max(round(GAP * n), 1))
    return np.where(is_test, "test", np.where(near_test, "", "train")).tolist()


def split_every(sequences, every):
    """'train' or 'test' of each frame: every N-th frame of a sequence is for testing."""
    numbers = pd.Series(sequences).groupby(sequences).cumcount() + 1
    return np.where(numbers % every == 0, "test", "train").tolist()


def write_scene(model, labels_path, scene, table, unit):
    """Write the label files of a scene, <scene>_train.csv and <scene>_test.csv, described. Prints what is written.

    model: where the poses are from, for messages. table: that of label_table. unit: see descriptions.read_unit.
    """
    for split in ("train", "test"):
        if split not in set(table["split"]):
            raise UserError(f"{model}: none of the {len(table)} registered images is in the {split} split; choose "
                            f"another split, such as --every 2")
    for split in ("train", "test"):
        path = Path(labels_path) / f"{scene}_{split}.csv"
        rows = table[table["split"] == split]
        write_labels(path, rows, {"unit": unit, "convention": "colmap"})
        print(f"{path}: {len(rows)} frames, positions in {'metres' if unit == 'm' else unit}")
    n_left_out = (table["split"] == "").sum()
    if n_left_out:
        print(f"{n_left_out} frames between training and test stretches are left out of both")


def print_next_commands(images, labels_path, scene, table):
    """Print the commands that train an APR and its PAE on a scene and refine its test poses, to paste.

    table: that of label_table. With too few training frames there is nothing to refine by.
    """
    out = f"out/{shlex.quote(scene)}"
    train, test = (shlex.quote(str(Path(labels_path) / f"{scene}_{split}.csv")) for split in ("train", "test"))
    images, setting = shlex.quote(str(images)), "--set backbone_type=mobilenet"
    apr, pae = f"{out}_apr/run_*_final.pth", f"{out}_pae/run_*_final.pth"  # the shell finds the stamps
    n_train = (table["split"] == "train").sum()
    commands = [f"main.py posenet train imagenet {images} {train} config.json {setting} --output_dir {out}_apr"]
    if n_train < MIN_REMEMBERED:
        print(f"{n_train} training frames are too few for a PAE, which refines poses and tells novelty from "
              f"{MIN_REMEMBERED} on")
        commands.append(f"main.py posenet test none {images} {test} config.json --checkpoint_path {apr} {setting}")
    else:
        commands += [f"main_learn_pose_encoding.py posenet train none {images} {train} config.json {apr} {setting} "
                     f"--output_dir {out}_pae",
                     f"main_refine_apr.py posenet optimize none {images} {test} config.json {apr} {pae} {setting} "
                     f"--output_dir {out}_refined"]
    print("Next:", *(f"python {command}" for command in commands), sep="\n")
