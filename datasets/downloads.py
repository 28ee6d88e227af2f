"""Official downloads: fetched, verified, unpacked, and the label files made of them; and how text files are read. For
the modules datasets.prepare_*.
"""
import argparse
import http.client
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from datasets.labels import write_labels
from util.errors import UserError

WAITS = (1, 3, 10, 30)  # seconds before another try at a download that brought nothing new
TIMEOUT = 60  # seconds without a byte
CHUNK = 2 ** 20


class BrokenOff(Exception):
    """A download that another try may complete."""


def parse_arguments(module, dataset, url, archives, flags=None):
    """The command line that both datasets share.

    module, dataset: their names. url: the default base URL. archives: {scene: its archive's path below the base URL}.
    flags: {flag that only this dataset has: its help}.
    Returns a namespace: dataset_path, download, yes, url, scenes (a list or None), labels_path, and the flags. Raises
    UserError for arguments that do not go together.
    """
    parser = argparse.ArgumentParser(prog=f"python -m datasets.{module}",
                                     description=f"Turn the official download of {dataset} into label files.")
    parser.add_argument("dataset_path", metavar="DATASET_PATH",
                        help="the folder of the scenes' folders; an official archive in it whose scene is not there is "
                             "unpacked, and kept")
    parser.add_argument("--download", action="store_true", help="fetch the scenes that are not there (default: no)")
    parser.add_argument("--yes", action="store_true", help="agree to the dataset's licence without being asked")
    parser.add_argument("--url", metavar="BASE", default=url, help=f"where to download from (default: {url})")
    parser.add_argument("--scenes", metavar="NAME", nargs="+",
                        help="the scenes to prepare (default: those that are there; with --download all official ones: "
                             f"{', '.join(archives)})")
    parser.add_argument("--labels_path", metavar="DIR", default=f"datasets/{dataset}",
                        help=f"where the label files go (default: datasets/{dataset})")
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    args = parser.parse_args()
    if args.url != url and not args.download:
        raise UserError("--url is for --download; add that, or leave --url out")
    if not args.url.startswith(("http://", "https://")):
        raise UserError(f"--url {args.url}: must begin with http:// or https://")
    if args.scenes:
        args.scenes = list(dict.fromkeys(args.scenes))  # each once
    for scene in args.scenes or []:
        if "/" in scene or scene in ("", ".", ".."):
            raise UserError(f"--scenes {scene}: give a folder's name, not a path")
        if args.download and scene not in archives:
            raise UserError(f"--scenes {scene}: no scene to download; choose from {', '.join(archives)}")
    return args


def get_scenes(args, dataset, licence, archives, is_scene, inner=None):
    """Download and unpack what is asked for and not there; returns the names of the scenes to prepare, sorted.

    args: those of parse_arguments. licence: the address of the licence's page. archives: as in parse_arguments.
    is_scene: says of a folder whether it is a scene's.
    inner: the pattern of archives in a scene's folder that are to be unpacked in place, such as 'seq-*.zip'.
    """
    root = Path(args.dataset_path)
    wanted = args.scenes or (list(archives) if args.download else [])
    absent = [scene for scene in wanted if not (root / scene).exists() and not (root / f"{scene}.zip").exists()]
    if args.download and absent:
        _agree(dataset, licence, absent, args.yes)
    elif not root.is_dir():
        raise UserError(f"{root}: no such folder; give the one of the scenes' folders, or add --download")
    elif absent:
        raise UserError(f"--scenes {absent[0]}: no such folder in {root}, and no archive {absent[0]}.zip")

    for scene in wanted or archives:
        archive = root / f"{scene}.zip"
        if scene in absent:
            download(f"{args.url.rstrip('/')}/{archives[scene]}", archive)
        if archive.exists() and not (root / scene).exists():
            unpack(archive, root / scene, inner)
    if not wanted:
        with reading(root):
            wanted = [path.name for path in root.iterdir()
                      if path.is_dir() and not path.name.startswith(".") and path.suffix != ".part" and is_scene(path)]
    if not wanted:
        raise UserError(f"{root}: no scene in it; it must hold the scenes' folders or archives, or add --download")
    if inner:
        for scene in wanted:
            unpack_inner(root / scene, inner)
    return sorted(wanted)


def download(url, path):
    """Fetch the file at `url` to `path`: under the name `<path>.part` until it is whole, from where an earlier run left it.

    A connection that breaks off is tried again, as often as it brings something new and len(WAITS) times more. Raises
    UserError for an address that has no such file, a server that cannot be reached, and a disk that cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    print(f"{url} -> {path}", flush=True)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    furthest, tries = -1, 0
    while True:
        try:
            _fetch_rest(url, part)
            break
        except BrokenOff as error:
            size = _size(part)
            tries = tries + 1 if size <= furthest else 0
            furthest = max(size, furthest)
            if tries == len(WAITS):
                raise UserError(f"{url}: the download does not get on: {error}; run again to resume it") from error
            print(f"{path.name}: {error}; trying again in {WAITS[tries]} s", flush=True)
            time.sleep(WAITS[tries])
    with writing(path):
        os.replace(part, path)


def unpack(archive, folder, inner=None, within=None):
    """Verify a zip archive and unpack its folder of `folder`'s name as `folder`, which must not be there yet.

    It is unpacked to `<folder>.part` and renamed, so `folder` appears complete or not at all.
    inner: the pattern of archives in it that are to be unpacked in place. within: the archive that this one was in.
    Raises UserError for an archive that is damaged, that holds no such folder, or of which a member would be written
    outside the folder or is a link, before anything is written; and for a disk that cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    name = f"{within}: {archive.name}" if within else archive
    part = folder.with_name(f"{folder.name}.part")
    print(f"verifying and unpacking {name}", flush=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            if members and min(member.header_offset for member in members) != 0:
                # Cut off behind an archive within it, whose directory was taken for its own.
                raise zipfile.BadZipFile("its directory is missing")
            for member in members:
                _refuse_outside(name, member)
            damaged = file.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
            if not any(member.filename.startswith(f"{folder.name}/") for member in members):
                raise UserError(f"{name}: holds no folder {folder.name}; it must, as the official archive does")
            shutil.rmtree(part, ignore_errors=True)
            for member in tqdm(members, desc=archive.name, unit="file", disable=None):
                file.extract(member, part)
        if inner:
            unpack_inner(part / folder.name, inner, within=archive)
        os.rename(part / folder.name, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:  # the last: encrypted
        raise UserError(f"{name}: a truncated or damaged archive ({error}); delete {within or 'it'} and get it "
                        f"again, as --download does") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be unpacked to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unpack_inner(folder, pattern, within=None):
    """Unpack the archives in `folder` that match `pattern` and are not unpacked yet, each in place.

    within: the archive that they came in; such archives are removed when they are unpacked, others are kept.
    """
    for archive in sorted(folder.glob(pattern)):
        if not archive.with_suffix("").exists():
            unpack(archive, archive.with_suffix(""), within=within)
        if within:
            archive.unlink()


def write_label_files(args, prefix, all_scenes_file, official, tables):
    """Write the label files of a dataset: one a scene and split, and one with the training rows of all scenes, if no scene
    was asked for by name.

    prefix: what the names begin with, before _<scene>_<split>.csv. official: the scenes that the papers' all-scenes file
    has; where one of them is there, ours has no others. tables: {scene: {split: DataFrame with labels.COLUMNS}}.
    """
    files = {f"{prefix}_{scene}_{split}.csv": table for scene in sorted(tables) for split, table in tables[scene].items()}
    together = [scene for scene in sorted(tables) if scene in official] or sorted(tables)
    if not args.scenes:
        files[all_scenes_file] = pd.concat([tables[scene]["train"] for scene in together])
    for name, table in files.items():
        write_labels(Path(args.labels_path) / name, table)
        print(f"{Path(args.labels_path) / name}: {len(table)} frames")
    if args.scenes:
        print(f"{all_scenes_file} is written where all scenes are prepared, without --scenes")
    elif set(together) != set(official):
        print(f"{all_scenes_file} has {', '.join(together)}, not {', '.join(official)}: scene indices are ranks among its "
              f"scenes")


def read_lines(path):
    """The lines of a text file, stripped. Raises UserError where it is missing or no text."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        return [line.strip() for line in file]


@contextmanager
def reading(path):
    """Turn a failure to read a file or folder at or below `path` into a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def writing(path):
    """Turn a failure to write the file `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _agree(dataset, licence, scenes, yes):
    """Name the licence and ask once. Raises UserError unless the answer is yes."""
    print(f"{dataset} has a licence of its own: {licence}", flush=True)
    if yes:
        return
    if not (sys.stdin and sys.stdin.isatty()):
        raise UserError(f"--download: there is no terminal to ask whether you agree to the licence, {licence}; if you do, "
                        f"add --yes")
    try:
        answer = input(f"Do you agree to it, and download {', '.join(scenes)}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("--download: nothing is downloaded unless you agree to the licence; answer y, or add --yes")


def _fetch_rest(url, part):
    """Ask once for what is missing of the file at `url`, and append it to `part`. Raises BrokenOff, or UserError for
    what no other try will mend."""
    size = _size(part)
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == "text/html":
                raise UserError(f"{url}: a web page, not an archive; has the address changed? --url gives another")
            if response.status == 206:
                content = re.fullmatch(rf"bytes {size}-\d+/(\d+)", response.headers["Content-Range"] or "")
                if not content:
                    _start_over(part)
                total = int(content[1])
            else:  # the whole file, whatever we asked for
                size, total = 0, int(response.headers["Content-Length"] or 0)
            _append(response, part, size, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing behind what we have: it is whole, or of another file
            if error.headers["Content-Range"] != f"bytes */{size}":
                _start_over(part)
        elif error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url}: the server answers {error.code} {error.reason}; --url gives another address") from error
        else:
            raise BrokenOff(f"the server answers {error.code} {error.reason}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url}: not a usable address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOff(str(getattr(error, "reason", error)) or "the connection broke off") from error


def _append(response, part, size, total):
    """Write a response to `part` behind its first `size` bytes; `total` is the size of the whole file, 0 if unknown."""
    with tqdm(desc=part.stem, initial=size, total=total or None, unit="B", unit_scale=True, disable=None) as bar:
        with writing(part), open(part, "ab" if size else "wb") as file:
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))
    if _size(part) < total:
        raise BrokenOff(f"the connection ended after {_size(part)} of {total} bytes")


def _chunks(response):
    """What a response brings; a broken connection is BrokenOff here, so that it is not taken for a full disk."""
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOff(str(error) or "the connection broke off") from error


def _start_over(part):
    """Forget what is here, which is of another file than the server's. Raises BrokenOff."""
    with writing(part):
        part.unlink()
    raise BrokenOff("what is here does not fit what the server has: starting over")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _refuse_outside(archive, member):
    """Raise UserError for a member of a zip archive that is a link or is not below the folder it is unpacked to."""
    parts = re.split(r"[/\\]", member.filename)
    if not parts[0] or ".." in parts or re.match("[A-Za-z]:", parts[0]):
        raise UserError(f"{archive}: its member {member.filename} would be written outside the folder; nothing is unpacked")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"{archive}: its member {member.filename} is a link, which may lead outside the folder; nothing is "
                        f"unpacked")
