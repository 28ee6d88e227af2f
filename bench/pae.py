"""What a PAE and a refiner cost to train, over 1, 2, 4 and 8 times as many frames.

The real scripts run, and their logs give the times.
"""
import datetime
import glob
import os
import re
import subprocess
import sys
import tempfile

import torch

from bench import common
from engine.run import device_of
from models import build_pose_encoder, load_apr
from util import cli

N_FRAMES, N_EPOCHS = 256, 100
CONFIG = {"backbone_type": "mobilenet", "hidden_dim": 256}
SETTINGS = ["--preset", "7Scenes", "--set", "backbone_type=mobilenet", f"n_epochs={N_EPOCHS}"]


def run(script, device, out, dataset_path, labels_file, *weights):
    """Train by a script; returns the seconds of the teacher's pass and of the training, and the peak memory in GiB."""
    command = [script, "posenet", "train", "none", dataset_path, labels_file, "config.json", *weights,
               "--device", device, "--output_dir", out, *SETTINGS]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(1)
    (log,) = glob.glob(f"{out}/*.log")
    times = {}
    with open(log) as file:
        for line in file:
            if match := re.match(r"(\S+ \S+) INFO (Labels|Latents|Training completed)", line):
                times[match[2]] = datetime.datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f")
    teacher, training = times["Latents"] - times["Labels"], times["Training completed"] - times["Latents"]
    return teacher.total_seconds(), training.total_seconds(), usage.ru_maxrss / 2 ** 20


def main():
    """Run the benchmark that the command line asks for."""
    parser = common.parser("pae", __doc__)
    parser.add_argument("--dataset_path", help=f"(default: {N_FRAMES} rendered frames of 640x480)")
    parser.add_argument("--labels_file", help="the label file of --dataset_path")
    parser.add_argument("--apr_checkpoint",
                        help="of PoseNet with MobileNetV2 (default: random weights, which cost the same)")
    parser.add_argument("--times", metavar="K", type=int, nargs="+", default=[1, 2, 4, 8], help="(default: 1 2 4 8)")
    args = parser.parse_args()
    device = str(device_of(args.device))
    dataset_path, labels_file = args.dataset_path, args.labels_file
    if dataset_path is None:
        dataset_path, labels_file = common.FRAMES, common.frames(N_FRAMES, 640, 480)
    with open(labels_file) as file:
        header, *lines = file.read().splitlines()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        apr, pae = args.apr_checkpoint or f"{folder}/apr.pth", f"{folder}/pae.pth"
        if args.apr_checkpoint is None:
            torch.save(load_apr("posenet", "none", dict(CONFIG)).state_dict(), apr)
        torch.save(build_pose_encoder("posenet", CONFIG).state_dict(), pae)
        for k in args.times:
            labels = f"{folder}/{k}.csv"
            with open(labels, "w") as file:
                file.write("\n".join([header, *lines * k]) + "\n")
            for what, script, weights in (("PAE", "main_learn_pose_encoding.py", (apr,)),
                                          ("refiner", "main_refine_apr.py", (apr, pae))):
                teacher, training, memory = run(script, device, f"{folder}/{what}-{k}", dataset_path, labels, *weights)
                rows.append({"training": what, "frames": k * len(lines), "teacher pass s": teacher,
                             f"{N_EPOCHS} epochs s": training, "epochs / teacher pass": training / teacher,
                             "ms per frame, both": 1000 * (teacher + training) / (k * len(lines)),
                             "peak GiB (host)": memory})
    common.show(args, {"PAE and refiner of PoseNet MobileNetV2": rows})


if __name__ == "__main__":
    cli.run(main)
