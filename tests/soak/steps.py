"""Trainings of many steps, whose memory and open files are counted. Reads /proc, so Linux only."""
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

N_EPOCHS = 10
SETTINGS = ["backbone_type=mobilenet", "hidden_dim=32", "batch_size=1", f"n_epochs={N_EPOCHS}", "n_workers=0",
            "n_freq_print=1000000", "n_freq_checkpoint=1000", "average_last=0"]


def run(script, dataset, labels, out, weights=()):
    """Train for ten epochs with a script. weights: the paths of the weights that it needs.

    Returns the resident memory (MB) and the number of open files as [(MB, files), ...], one per epoch at its first
    step and one at the end of the training, and the path of the final weights.
    """
    command = [sys.executable, ROOT / script, "posenet", "train", "none", dataset, labels, ROOT / "config.json",
               *weights, "--output_dir", out, "--set", *SETTINGS]
    resources, last = [], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("[Batch-1/Epoch-") or line.startswith("Training completed"):
                resources.append(_resources(process.pid))
            last = line
    assert process.returncode == 0 and len(resources) == N_EPOCHS + 1
    return resources, Path(last.strip().removeprefix("Weights: "))


def _resources(pid):
    """A process's resident memory in MB, and its number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))
