"""Scripts that demo, bench and reproduce run as processes of their own."""
import os

import pytest

from engine.scripts import pae_script, run_script
from util.errors import UserError


@pytest.fixture
def script(tmp_path):
    """A function that writes a script, and returns its path."""
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path
    return write


def test_lines_arrive_as_they_are_printed(script, tmp_path):
    waiting = script("import pathlib, sys, time\n"
                     "print('first', flush=True)\n"
                     "while not pathlib.Path(sys.argv[1]).exists():\n"
                     "    time.sleep(0.01)\n"
                     "print('second')\n")
    arrived = []
    lines = run_script(waiting, tmp_path / "go", on_line=lambda line: (arrived.append(line), (tmp_path / "go").touch()))
    assert lines == ["first", "second"] and arrived == ["first\n", "second\n"]


def test_a_script_that_fails_ends_this_process_with_its_status(script, capfd):
    with pytest.raises(SystemExit) as stopped:
        run_script(script("import sys\nprint('the reason', file=sys.stderr)\nsys.exit(3)\n"))
    assert stopped.value.code == 3 and capfd.readouterr().err == "the reason\n"


@pytest.mark.parametrize("code, message", [("print('a bar', 'x' * 100000, 'the reason', sep='\\n', file=sys.stderr)",
                                            "the reason"), ("pass", r"script\.py has failed")])
def test_captured_errors_are_raised(script, capfd, code, message):
    with pytest.raises(UserError, match=f"{message}$"):
        run_script(script(f"import sys\n{code}\nsys.exit(2)\n"), capture_errors=True)
    assert not capfd.readouterr().err


def test_a_script_ends_with_the_command_that_runs_it(script):
    endless = script("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    pids = []

    def interrupt(line):
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_script(endless, on_line=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_every_pae_has_its_script():
    assert pae_script("posenet") == "main_learn_pose_encoding.py"
    assert pae_script("ems-transposenet") == "main_learn_multiscene_pose_encoding.py"
