"""The scripts as processes of their own, for commands that drive them."""
import contextlib
import subprocess
import sys
import tempfile

from models import SINGLE_SCENE_APRS
from util.errors import UserError


def pae_script(model_name):
    """The script that trains and tests the PAE of an APR."""
    if model_name in SINGLE_SCENE_APRS:
        return "main_learn_pose_encoding.py"
    return "main_learn_multiscene_pose_encoding.py"


def run_script(*command, on_line=lambda line: None, capture_errors=False):
    """Run a script, or a module as `-m NAME`, and return the lines that it prints.

    on_line: called with every line, as it comes.
    capture_errors: keep its stderr from the screen. A script that fails then raises UserError with its last line there;
        otherwise its error is on the screen, and this process exits with its status.
    """
    with tempfile.TemporaryFile("w+") if capture_errors else contextlib.nullcontext() as errors:
        with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=errors,
                              text=True) as process:
            lines = []
            try:
                for line in process.stdout:
                    on_line(line)
                    lines.append(line.rstrip("\n"))
            except BaseException:
                _end(process)
                raise
        if process.returncode and not capture_errors:
            sys.exit(process.returncode)
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise UserError(said[-1] if said else f"{command[0]} has failed")
    return lines


def _end(process):
    """End a script together with this process. Ctrl-C reaches both; another signal may be to this process alone."""
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.terminate()
