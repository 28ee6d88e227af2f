"""The command `python -m datasets.synthetic_scenes`."""
import argparse
import os
import shutil
import sys

import numpy as np

from datasets.synthetic_scenes.layouts import write_scene
from datasets.synthetic_scenes.paths import TRAIN_SEQUENCES
from datasets.synthetic_scenes.rooms import make_excursion, make_room, make_yard
from util import cli
from util.errors import UserError
from util.files import writing

SCENES = {"room": make_room, "yard": make_yard, "excursion": make_excursion}


def main():
    """Render the scenes that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m datasets.synthetic_scenes",
        description="Render textured 3-D scenes with exact poses, in the layout of a dataset.")
    parser.add_argument("folder", metavar="OUT", help="the folder to write the scenes to")
    parser.add_argument("--scenes", metavar="KIND", nargs="+", choices=SCENES, default=["room", "yard"],
                        help="scenes to render; named room-1, room-2, yard-1 ...; an excursion is a room whose test "
                             "walk leaves the trained part half of the time (default: room yard)")
    parser.add_argument("--layout", choices=("7Scenes", "cambridge"), default="7Scenes", help="(default: 7Scenes)")
    parser.add_argument("--frames", metavar="N", type=int, default=120,
                        help=f"frames per sequence; a scene has {TRAIN_SEQUENCES} sequences for training and one for "
                             "testing (default: 120)")
    parser.add_argument("--width", metavar="PIXELS", type=int, default=320,
                        help="width of an image; its height is 3/4 of that (default: 320)")
    parser.add_argument("--seed", metavar="N", type=int, default=0,
                        help="another seed gives other scenes and paths (default: 0)")
    args = parser.parse_args()
    for name, minimum in (("frames", 2), ("width", 32), ("seed", 0)):
        if getattr(args, name) < minimum:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {minimum}")

    names = [f"{kind}-{args.scenes[:i + 1].count(kind)}" for i, kind in enumerate(args.scenes)]
    for name in names:
        if os.path.exists(os.path.join(args.folder, name)):
            raise UserError(f"{os.path.join(args.folder, name)} exists already; remove it or name another folder")
    for i, (kind, name) in enumerate(zip(args.scenes, names, strict=True)):
        folder = os.path.join(args.folder, name)
        random = np.random.default_rng((args.seed, i))
        try:
            with writing(folder):
                shutil.rmtree(f"{folder}.part", ignore_errors=True)
                scene = SCENES[kind](random)
                distance = write_scene(f"{folder}.part", scene, args.layout, args.frames, args.width, random)
                os.rename(f"{folder}.part", folder)
        finally:
            shutil.rmtree(f"{folder}.part", ignore_errors=True)
        print(f"{folder}: {TRAIN_SEQUENCES * args.frames} training and {args.frames} test frames, the test frames a "
              f"median of {distance:.2f} m from the nearest training position")


if __name__ == "__main__":
    sys.argv[0] = os.path.dirname(sys.argv[0])  # errors begin with the package's name, not with __main__.py
    cli.run(main)
