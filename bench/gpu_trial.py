"""What the checks of bench.gpu share: their scale, a rendered scene, trainings by the scripts, the form of a row."""
import math
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.variants import MODELS
from datasets import transforms
from datasets.synthetic_scenes.paths import TRAIN_SEQUENCES
from engine.scripts import run_script

TIMEOUT = 300  # seconds that a training may take


class Skipped(Exception):
    """A check that cannot run here; the text says why."""


@contextmanager
def cropped(size):
    """Within the block, frames are cropped to this size, in pixels."""
    before, transforms.SIZE = transforms.SIZE, size
    try:
        yield
    finally:
        transforms.SIZE = before


def row(name, figures, limit, passed):
    """A row of the table. figures: {what: number or text}. passed: whether they are within the limit."""
    return {"check": name, "figures": figures, "limit": limit, "result": "passed" if passed else "failed"}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    frames: per sequence of the rendered scene. width: of a frame. size: of the crop that the networks take.
    n_epochs: of PoseNet's training; n_frozen_epochs: of those with frozen norms.
    batch_size, n_workers: of these trainings. n_batches: of the epoch in which waiting for data is timed.
    n_watched: batches of the loops that may not wait for the GPU.
    timed: the APRs whose trainings are timed. speed_batch: the batch size of these, None: the published ones.
    rounds, seconds: as bench.models has them.
    n_golden: the models of a kind that are compared with golden outputs, None: all.
    worse: how many times fp32's errors those in bf16 and fp16 may be.
    compiled: the models that torch.compile is tried on, and its backend.
    """
    frames: int
    width: int
    size: int
    n_epochs: int
    n_frozen_epochs: int
    batch_size: int
    n_workers: int
    n_batches: int
    n_watched: int
    timed: tuple
    speed_batch: int | None
    rounds: int
    seconds: float
    n_golden: int | None
    worse: float
    compiled: tuple
    backend: str


GPU = Scale(frames=40, width=320, size=224, n_epochs=20, n_frozen_epochs=6, batch_size=32, n_workers=4, n_batches=30,
            n_watched=8, timed=tuple(MODELS), speed_batch=None, rounds=2, seconds=0.5, n_golden=None, worse=1.1,
            compiled=("posenet-mobilenet", "ems-transposenet"), backend="inductor")
# Enough to see that the command works. The backend needs no C++ compiler.
CPU = Scale(frames=2, width=64, size=32, n_epochs=3, n_frozen_epochs=2, batch_size=4, n_workers=0, n_batches=2,
            n_watched=3, timed=("posenet-mobilenet", "ems-transposenet"), speed_batch=2, rounds=1, seconds=0,
            n_golden=1, worse=3, compiled=("pae",), backend="aot_eager")


class Trial:
    """What the checks share: a device, the scale of everything, and a rendered scene with a PoseNet trained on it.

    scale: a Scale. folder: for all files, which exists.
    """

    def __init__(self, device, scale, folder):
        self.device, self.scale, self.folder = device, scale, Path(folder)
        self.dataset_path = self.folder / "data"
        self.settings = ["backbone_type=mobilenet", f"batch_size={scale.batch_size}", f"n_workers={scale.n_workers}",
                         "precision=fp32", "n_freq_print=1", "n_freq_checkpoint=1000"]

    @property
    def on_gpu(self):
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def labels(self):
        """The label files of the scene, {split: path}, which is rendered first."""
        run_script("-m", "datasets.synthetic_scenes", self.dataset_path, "--scenes", "room", "--frames",
                   self.scale.frames, "--width", self.scale.width, capture_errors=True)
        run_script("-m", "datasets.prepare_7scenes", self.dataset_path, "--labels_path", self.folder,
                   capture_errors=True)
        return {split: self.folder / f"abs_7scenes_pose.csv_room-1_{split}.csv" for split in ("train", "test")}

    @property
    def n_steps(self):
        """The steps of an epoch."""
        return math.ceil(TRAIN_SEQUENCES * self.scale.frames / self.scale.batch_size)

    def train(self, name, *more, device=None, launcher=(), steady=(), settings=(), status=0):
        """Train PoseNet by main.py, through bench.steady, in the folder `name` of the trial's. Returns that folder.

        device: for --device. launcher: arguments of python, such as those of torchrun. steady: options of bench.steady.
        status: the exit status that is expected. Raises RuntimeError for another, with the script's last line.
        """
        folder = self.folder / name
        command = [*launcher, "-m", "bench.steady", "--size", self.scale.size, *steady, "main.py", "posenet", "train",
                   "none", self.dataset_path, self.labels["train"], "config.json", "--preset", "7Scenes",
                   "--device", device or self.device, "--output_dir", folder, *more, "--set", *self.settings, *settings]
        with open(self.folder / f"{name}.txt", "w+") as output:
            process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT)
            try:
                process.wait(TIMEOUT)
            finally:
                if process.poll() is None:
                    process.terminate()  # torchrun then ends its processes
                    process.wait(60)
            if process.returncode != status:
                output.seek(0)
                raise RuntimeError(f"{name}: {(output.read().strip().splitlines() or ['no message'])[-1]}")
        return folder

    @cached_property
    def apr(self):
        """The weights of a PoseNet that is trained on the scene."""
        return final_weights(self.train("whole", settings=self.epochs))

    @property
    def epochs(self):
        """The settings of the training of `apr`."""
        return [f"n_epochs={self.scale.n_epochs}", f"lr_scheduler_step_size={max(self.scale.n_epochs // 3, 1)}"]

    def train_frozen(self, name, *more, **options):
        """Train with frozen norms, so that a step's loss depends on the weights and its batch alone.

        Adam's eps is large: with the published one, a gradient of rounding errors alone moves a weight as far as any.
        """
        options["steady"] = ["--frozen_norms", *options.get("steady", ())]
        return self.train(name, *more, **options, settings=[
            "lr=1e-4", "eps=1e-3", "average_last=0", f"n_epochs={self.scale.n_frozen_epochs}"])

    @cached_property
    def losses(self):
        """The losses of `train_frozen` in one process, see `losses_in`."""
        return losses_in(self.train_frozen("one"))


def final_weights(folder):
    """The final weights of the training in a folder: a path."""
    [path] = folder.glob("run_*_final.pth")
    return path


def losses_in(folder):
    """The losses that the log of the training in a folder tells, of every step: {(epoch, batch): loss}."""
    [log] = folder.glob("run_*.log")
    lines = re.findall(r"\[Batch-(\d+)/Epoch-(\d+)\] running camera pose loss: (\S+),", log.read_text())
    return {(int(epoch), int(batch)): float(loss) for batch, epoch, loss in lines}
