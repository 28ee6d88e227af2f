"""Files: comparing paths, writing files whole or not at all, and locks that end with their process."""
import glob
import hashlib
import os
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # a system without these locks
    lockf = None

from util.errors import UserError


def same_file(path, other):
    """Return whether two paths lead to the same existing file."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def sha256(path):
    """The SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path):
    """Within the block, a failure to write a file or folder `path` becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def whole_file(path, mode="w"):
    """Open a file for writing that appears under `path` complete or not at all.

    The file is written beside `path`, and renamed if the block ends without an exception. Incomplete files of killed
    processes that were writing the same file are removed. Raises UserError if the system refuses to write.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written: it is not a file")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(glob.escape(str(path)) + ".*.part", older_than=60)  # a new file is locked a moment later
            with open(part, mode) as file:
                lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())  # some file systems report only now that they are full
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink()


def lock(file):
    """Lock an open file, or descriptor, until it is closed or the process ends in any way.

    Returns False if another process has locked it, else True, also on a file system without locks.
    """
    if lockf is None:
        return True
    try:
        lockf(file, LOCK_EX | LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def remove_parts(pattern, older_than=0):
    """Remove incomplete files that killed processes left: those that match a pattern and are not locked.

    older_than: seconds since the last change of a file before it may be removed.
    """
    for part in glob.glob(pattern):
        with suppress(OSError), open(part, "r+b") as file:
            if os.path.getmtime(part) <= time.time() - older_than and lock(file):
                os.remove(part)
