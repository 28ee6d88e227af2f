"""How commands end: user errors and signals become one line and an exit status."""
import atexit
import contextlib
import gc
import logging
import os
import re
import sys
import time

from util import processes, signals
from util.errors import UserError


def run(command, advice=lambda: ""):
    """Call a command's main function.

    A UserError becomes one line on stderr and in the log, and exit status 2. SIGINT and SIGTERM become one line and
    exit status 130 or 143. Any other exception is a bug and keeps its traceback.

    advice: function without arguments that returns what a user can do after a signal, for that line.
    """
    gc.set_threshold(10_000)  # loading the libraries makes many objects and no garbage
    atexit.register(gc.freeze)  # else Python looks for garbage once more when it exits, for a quarter of a second
    if "OMP_WAIT_POLICY" not in os.environ:
        # PyTorch's threads wait for each other in a loop of by default 300,000 rounds (libgomp), and so keep the cores
        # from whatever else runs: workers that decode, another training. Now they soon sleep instead.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        # The other ranks have nothing to clean up or report.
        with signals.raised() if processes.rank() == 0 else contextlib.nullcontext():
            _run_naming_system_limits(command)
    except UserError as error:
        if processes.rank() > 0:
            time.sleep(5)  # rank 0 may report the same error, and torchrun then ends this process first
        _report(f"error: {error}")
        sys.exit(2)
    except signals.Stopped as stopped:
        if processes.rank() == 0:
            text = advice()
            _report(f"{stopped}" + (f"; {text}" if text else ""))
        sys.exit(stopped.status)


def _run_naming_system_limits(command):
    """Call a command. Too many open files, and the end of another rank, become a UserError."""
    try:
        command()
    except (OSError, RuntimeError) as error:
        if "Too many open files" in str(error):  # PyTorch's loader reports it as text only
            raise UserError("too many open files for a process here: allow more (ulimit -n 1024), or take fewer "
                            "workers (--set n_workers=0)") from error
        if not (processes.under_torchrun() and re.search("Connection (closed|reset) by peer", str(error))):
            raise
        time.sleep(2)  # torchrun then sends SIGTERM, and the line for that says how to resume
        raise UserError(f"process {processes.rank()} of this run: another process has ended; "
                        "see its message") from error


def _report(text):
    """Print a line on stderr, and log it where a log exists."""
    if logging.getLogger().handlers:
        with contextlib.suppress(UserError):  # the log cannot be written
            logging.error(text.removeprefix("error: "))
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)
