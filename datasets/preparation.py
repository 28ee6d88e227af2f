"""What prepare_7scenes and prepare_cambridge share: arguments, scenes from folders or archives, and label files."""
import argparse
import sys
from pathlib import Path

import pandas as pd

from datasets.archives import unpack, unpack_inner
from datasets.downloads import download
from datasets.labels import write_labels
from datasets.text_files import reading
from util.errors import UserError


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
        write_labels(Path(args.labels_path) / name, table)
        print(f"{Path(args.labels_path) / name}: {len(table)} frames")
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
