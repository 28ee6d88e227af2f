"""Telling files apart, and writing them whole or not at all."""
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path

from util.errors import UserError


def same_file(path, other):
    """Whether two paths lead to one file that is there."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


@contextmanager
def whole_file(path, mode="w"):
    """Open a file for writing that appears under `path` complete or not at all.

    It is written beside `path` and renamed when the block ends without an exception. Raises UserError where the
    system refuses to write.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written: is no file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode) as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
