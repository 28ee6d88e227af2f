"""Logging to the screen, above progress bars, and to a file."""
import contextlib
import logging
import os
import sys

from util.files import writing
from util.units import in_unit

DETAIL = {"detail": True}  # `extra` of records that the screen shows only when it is verbose


def log_to(path, descriptor, verbose=False, screen=None):
    """Send log records to the screen and to an open file.

    path: the file's name, for error messages; descriptor: the open file's. verbose: show DETAIL records on the screen.
    screen: the stream that is the screen (default: the standard output).
    """
    to_file, to_screen = _LogFile(path, descriptor), _Screen(screen or sys.stdout)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen.addFilter(lambda record: record.levelno < logging.ERROR)  # util.cli prints errors to stderr
    for handler in (to_file, to_screen):
        handler.addFilter(_say_unit)
    to_screen.addFilter(lambda record: verbose or not getattr(record, "detail", False))
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_screen], format="%(message)s", force=True)
    logging.captureWarnings(True)
    for library in ("matplotlib", "numexpr"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _say_unit(record):
    """Let a record through, with its positions in the run's unit."""
    record.msg, record.args = in_unit(record.getMessage()), None
    return True


def log_nowhere():
    """Drop log records, on ranks other than 0."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


@contextlib.contextmanager
def quiet():
    """Within the block, drop log records below warnings."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class _LogFile(logging.Handler):
    """Writes records to a file descriptor at once. A full disk ends the run with a UserError."""

    def __init__(self, path, descriptor):
        super().__init__()
        self.path, self.descriptor = path, descriptor

    def emit(self, record):
        with writing(self.path):
            os.write(self.descriptor, (self.format(record) + "\n").encode())

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        super().close()


class _Screen(logging.StreamHandler):
    """Writes records above progress bars. The run continues if its terminal, or the `| head` behind it, ends."""

    def emit(self, record):
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError, ValueError):  # drop the rest of its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
