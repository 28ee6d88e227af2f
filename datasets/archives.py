"""Zip archives: verified, and unpacked completely or not at all."""
import os
import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from util.errors import UserError


def unpack(archive, folder, inner=None, within=None):
    """Verify a zip archive and unpack its folder of `folder`'s name as `folder`, which must not exist yet.

    It is unpacked to `<folder>.part` and renamed, so `folder` appears complete or not at all.
    inner: the pattern of archives in it that are to be unpacked in place. within: the archive that contained this one.

    Raises UserError, before anything is written, for an archive that is damaged or holds no such folder, and for a
    member that is a link or would be written outside the folder. Raises it, too, where the disk cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    name = f"{within}: {archive.name}" if within else archive
    part = folder.with_name(f"{folder.name}.part")
    print(f"verifying and unpacking {name}", flush=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            if members and min(member.header_offset for member in members) != 0:
                # Cut off behind an inner archive: the inner archive's directory was taken for the outer one's.
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

    within: the archive that contained them; such archives are removed afterwards, others are kept.
    """
    for archive in sorted(folder.glob(pattern)):
        if not archive.with_suffix("").exists():
            unpack(archive, archive.with_suffix(""), within=within)
        if within:
            archive.unlink()


def _refuse_outside(archive, member):
    """Raise UserError for a member of a zip archive that is a link or would be written outside the archive's folder."""
    parts = re.split(r"[/\\]", member.filename)
    if not parts[0] or ".." in parts or re.match("[A-Za-z]:", parts[0]):
        raise UserError(f"{archive}: its member {member.filename} would be written outside the folder; "
                        "nothing is unpacked")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(f"{archive}: its member {member.filename} is a link, which may lead outside the folder; "
                        "nothing is unpacked")
