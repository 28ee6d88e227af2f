"""What the benchmarks share: arguments, frames, tables and JSON."""
import argparse
import json
import os
import platform

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transforms3d.quaternions import mat2quat

from datasets.labels import COLUMNS
from datasets.synthetic_scenes import camera_path, make_room, render
from engine.run import device_of
from util.files import whole_file

FRAMES = "out/bench/frames"


def parser(name, description):
    """An argument parser with what every benchmark takes. name: the module's."""
    arguments = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    arguments.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    arguments.add_argument("--json", metavar="FILE", default=f"out/bench/{name}.json",
                           help=f"(default: out/bench/{name}.json)")
    return arguments


def frames(n, width, height):
    """The label file of n rendered frames, PNG files in FRAMES, which are rendered unless they exist."""
    labels = f"{FRAMES}/{n}-{width}x{height}.csv"
    if os.path.exists(labels):
        return labels
    scene = make_room(np.random.default_rng(0))
    path = zip(*camera_path(scene, n, np.random.default_rng(1)))
    folder = f"room/{n}-{width}x{height}"
    os.makedirs(f"{FRAMES}/{folder}", exist_ok=True)
    lines = [",".join(COLUMNS)]
    for i, (position, rotation) in enumerate(tqdm(path, total=n, desc=f"rendering {width}x{height}", disable=None)):
        name = f"{folder}/frame-{i:06d}.color.png"
        Image.fromarray(render(scene.faces, position, rotation, width, height)).save(f"{FRAMES}/{name}")
        pose = (f"{x:.9f}" for x in (*position, *mat2quat(rotation)))
        lines.append(",".join(("room", "train", "seq-01", name, *pose)))
    with whole_file(labels) as file:
        file.write("\n".join(lines) + "\n")
    return labels


def show(args, tables):
    """Print tables, {title: list of rows, dicts of the same keys}, as Markdown and write them to args.json."""
    device = device_of(args.device)
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    for title, rows in tables.items():
        print(f"\n{title}\n")
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print(f"| {' | '.join(map(_cell, row.values()))} |")
    with whole_file(args.json) as file:
        json.dump({"machine": machine, **tables}, file, indent=1)
    print(f"\n{machine}\n{args.json}")


def _cell(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
