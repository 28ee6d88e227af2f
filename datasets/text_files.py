"""Text files, and failures to read a file as user errors."""
from contextlib import contextmanager

from util.errors import UserError


def read_lines(path):
    """The lines of a text file, stripped. Raises UserError where it cannot be read or is not UTF-8."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        return [line.strip() for line in file]


@contextmanager
def reading(path):
    """Within the block, a failure to read a file or folder at or below `path` becomes a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
