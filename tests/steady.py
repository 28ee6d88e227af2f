"""Run a script with a PoseNet that computes the same in training as in testing: batch norm by its statistics, no dropout, no
drop-connect.  python tests/steady.py main.py ARGUMENTS"""
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch import nn

from models.posenet import PoseNet

PoseNet.train = lambda self, mode=True: nn.Module.train(self, False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
