"""Run a script with a PoseNet that computes the same in training as in testing, on frames of 64 x 64 pixels.

Batch norm takes its statistics from the weights, nothing is dropped: python tests/steady.py main.py ARGUMENTS
"""
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import nn

from datasets import transforms
from models.posenet import PoseNet


def make_steady(set_attribute=setattr):
    """Change PoseNet and the crops of this process by `set_attribute`, such as a monkeypatch's."""
    set_attribute(PoseNet, "train", lambda self, mode=True: nn.Module.train(self, False))
    set_attribute(transforms, "SIZE", 64)


if __name__ == "__main__":
    make_steady()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
