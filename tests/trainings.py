"""Small trainings of PoseNet and what is trained on its latents, for tests of how trainings end early and resume.

They work on the layout that the fixture `attic` of conftest.py writes.
"""
import contextlib
import signal
import subprocess
import sys

from conftest import ROOT, fails_here, signal_after_step

SETTINGS = ["--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=4", "batch_size=3", "n_workers=0",
            "n_freq_checkpoint=100", "precision=fp32"]


def training(attic, out, *more, script="main.py", labels="train.csv", **settings):
    """The arguments of a training of two steps per epoch, which writes to the folder `out`. settings: for --set."""
    weights = {"main.py": [], "main_learn_pose_encoding.py": [attic / "apr.pth"],
               "main_refine_apr.py": [attic / "apr.pth", "none"]}[script]
    return ["posenet", "train", "none", attic, attic / labels, ROOT / "config.json", *weights,
            "--output_dir", attic / out, *more, *SETTINGS, *(f"{key}={value}" for key, value in settings.items())]


def evaluation(attic, out, *more, labels="train.csv", **settings):
    """The arguments of a test of the APR in apr.pth."""
    arguments = training(attic, out, "--checkpoint_path", attic / "apr.pth", *more, labels=labels, **settings)
    return ["posenet", "test", *arguments[2:]]


def interrupt(script, arguments, after_step, signum=signal.SIGTERM):
    """Run a training that gets a signal after its n-th step; returns its exit status and its last line."""
    with signal_after_step(after_step, signum):
        return fails_here(script, *arguments)


def stop_in_third_epoch(attic, out):
    """Begin a training of four epochs in the folder `out` that stops in the third, and leaves the two states before."""
    interrupt("main.py", training(attic, out), 3)
    interrupt("main.py", training(attic, out, "--resume", "latest"), 3)  # the first resumed epoch is always saved
    assert len(states(attic / out)) == 2


def states(folder):
    """The state files of the training in a folder, newest first."""
    return sorted(folder.glob("*_resume-*.pth"), reverse=True)


@contextlib.contextmanager
def locked(path):
    """Within the block, another process holds a lock on a file."""
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('locked', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            yield
        finally:
            process.kill()
