"""Telling files apart, writing them whole or not at all, and locks that end with their process."""
import glob
import os
import secrets
import time
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # another system: no locks
    def lockf(*args):
        pass
    LOCK_EX = LOCK_NB = 0

from util.errors import UserError


def same_file(path, other):
    """Whether two paths lead to one file that is there."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


@contextmanager
def whole_file(path, mode="w"):
    """Open a file for writing that appears under `path` complete or not at all.

    It is written beside `path` and renamed when the block ends without an exception. What a process left that was killed
    while it wrote this file is removed. Raises UserError where the system refuses to write.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written: is no file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(glob.escape(str(path)) + ".*.part", older_than=60)  # seconds; a part is not locked at once
        with open(part, mode) as file:
            lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def lock(file):
    """Lock an open file, or descriptor, until it is closed or the process ends in any way; returns whether no other process
    has it locked. Where a file system has no locks, none has."""
    try:
        lockf(file, LOCK_EX | LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def remove_parts(pattern, older_than=0):
    """Remove files that match a pattern, were last changed so many seconds ago, and are not locked: what killed processes
    left of files they wrote."""
    for part in glob.glob(pattern):
        with suppress(OSError), open(part, "r+b") as file:
            if os.path.getmtime(part) <= time.time() - older_than and lock(file):
                os.remove(part)
