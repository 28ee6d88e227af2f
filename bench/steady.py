"""Run a script so that two runs of it can be compared: with deterministic kernels, and in fp32 without TF32.

    python -m bench.steady [options] main.py ARGUMENTS
"""
import argparse
import os
import runpy
import signal
import sys

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from datasets import transforms
from engine import run
from models.posenet import PoseNet
from util import processes


def without_tf32():
    """Let fp32 be fp32 on GPUs, which by default shorten the numbers in convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def make_deterministic():
    """Let this process choose kernels that compute the same every time. Call it before any of them runs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def share_gpu():
    """Let all processes of a run take the first GPU. NCCL refuses this, so they exchange by gloo."""
    def join(device):
        if processes.under_torchrun():
            torch.distributed.init_process_group("gloo", timeout=processes.TIMEOUT)

    processes.join = join
    run.device_of = lambda asked, preferred=None: torch.device("cuda", 0)


def kill_after(n_steps):
    """Let this process be killed after its n-th optimizer step."""
    steps = []

    def count(*args):
        steps.append(1)
        if len(steps) == n_steps:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


def main():
    """Run the script that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.steady", description=__doc__.splitlines()[0])
    parser.add_argument("--size", metavar="PIXELS", type=int, default=transforms.SIZE,
                        help=f"crop frames to this size (default: {transforms.SIZE})")
    parser.add_argument("--frozen_norms", action="store_true",
                        help="let PoseNet compute in training as in testing: batch norm by the weights' statistics, "
                             "and no dropout")
    parser.add_argument("--share_gpu", action="store_true", help="let all processes take the first GPU")
    parser.add_argument("--kill_after", metavar="N", type=int, help="kill the process after its N-th optimizer step")
    parser.add_argument("command", metavar="SCRIPT ARGUMENTS", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    without_tf32()
    make_deterministic()
    transforms.SIZE = args.size
    if args.frozen_norms:
        PoseNet.train = lambda self, mode=True: nn.Module.train(self, False)
    if args.share_gpu:
        share_gpu()
    if args.kill_after:
        kill_after(args.kill_after)
    sys.argv = args.command
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
