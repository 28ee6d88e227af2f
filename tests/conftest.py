"""What the tests share: small layouts of frames, and running the scripts."""
import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drive import drive  # noqa: F401 (a fixture)
from matplotlib.figure import Figure
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from models import get_model
from util import cli

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
MINI = SHARED / "data" / "7scenes_mini"
PUBLISHED = SHARED / "data" / "published"
COLUMNS = "scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4"

needs_real_frames = pytest.mark.skipif(not MINI.is_dir(), reason="the real frames are not available")


@pytest.fixture(scope="module")
def small_frames():
    """Crop frames to 64 x 64 pixels instead of 224 x 224, for tests that do not depend on what a network computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.transforms.SIZE", 64)
        yield


def write_scene(dataset, scene, n_frames, split, seed=0):
    """Write frames of noise with random poses; returns their label rows."""
    random = np.random.default_rng([seed, len(scene), *scene.encode(), split == "train"])
    rows = []
    for i in range(n_frames):
        name = f"{scene}/seq-{split}/frame-{i:06d}.color.png"
        path = dataset / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((320, 240)).save(path)
        quaternion = random.standard_normal(4)
        pose = [*random.standard_normal(3), *(quaternion / np.linalg.norm(quaternion))]
        rows.append(",".join([scene, split, f"seq-{split}", name, *(f"{value:.7f}" for value in pose)]))
    return rows


def write_labels(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


def run_script(*arguments, cwd=ROOT, env=None):
    """Run a script as a user does; returns the finished process."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)


def run_well(*arguments, **kwargs):
    """Run a script that must succeed; returns what it printed."""
    process = run_script(*arguments, **kwargs)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def run_here(script, *arguments):
    """Run a script within this process, which saves its imports; returns what it printed.

    Its pictures are composed, but written blank: drawing them takes longer than most of these runs. test_plots.py draws
    all of them, and so do runs of the scripts in processes of their own.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.setattr(Figure, "savefig", lambda self, file, **options: Image.new("L", (1, 1)).save(file, "png"))
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return output.getvalue()


def fails_here(script, *arguments):
    """Run a script within this process that must fail with one line on stderr; returns its exit status and the line."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        run_here(script, *arguments)
    [line] = errors.getvalue().splitlines()
    return stopped.value.code, line


@contextlib.contextmanager
def signal_after_step(n, signum=signal.SIGTERM):
    """Within the block, this process gets a signal after the n-th optimizer step that it takes."""
    steps = []

    def count(*args):
        steps.append(1)
        if len(steps) == n:
            os.kill(os.getpid(), signum)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def run_module_here(module, *arguments):
    """Run a module's main within this process as `python -m` would; returns its exit status, stdout and stderr."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        try:
            cli.run(module.main)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
    return status, output.getvalue(), errors.getvalue()


def weights_of(output):
    """The path of the weights that a training names in its last line."""
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("Weights: "), last
    return Path(last.removeprefix("Weights: "))


def same_weights(first, second):
    """Whether two weights files hold equal tensors under the same names."""
    first, second = torch.load(first), torch.load(second)
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.fixture(scope="module")
def attic(tmp_path_factory, small_frames):
    """A folder with a scene of six training and three test frames, and apr.pth, the weights of a PoseNet.

    train.csv and test.csv list the frames, two.csv the first two training frames.
    """
    root = tmp_path_factory.mktemp("attic")
    for split, n in (("train", 6), ("test", 3)):
        write_labels(root / f"{split}.csv", write_scene(root, "attic", n, split))
    (root / "two.csv").write_text("".join((root / "train.csv").read_text().splitlines(keepends=True)[:3]))
    torch.manual_seed(0)
    apr = get_model("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 16})
    torch.save(apr.state_dict(), root / "apr.pth")
    return root
