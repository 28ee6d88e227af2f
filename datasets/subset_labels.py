"""A part of a label file, for experiments on less data.

    python -m datasets.subset_labels FILE.csv OUT.csv --share 0.3 [--seed 0] [--by frames|sequences]
"""
import argparse

import numpy as np

from datasets.descriptions import describe
from datasets.labels import read_labels, write_labels
from util import cli
from util.errors import UserError
from util.files import same_file


def subset(labels, share, seed=0, by="frames"):
    """Draw a share of every scene's frames, or of its sequences with all their frames; at least one of each scene.

    labels: a table of read_labels. Returns its drawn rows, in their order.
    """
    random = np.random.default_rng(seed)
    unit = labels.index if by == "frames" else labels["seq"]
    drawn = np.zeros(len(labels), bool)
    for _, of_scene in labels.groupby("scene", sort=True):
        units = unit[of_scene.index].unique()
        chosen = random.permutation(units)[:max(1, round(share * len(units)))]
        drawn[of_scene.index[unit[of_scene.index].isin(chosen)]] = True
    return labels[drawn]


def main():
    """Write the part that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m datasets.subset_labels",
                                     description="Write a part of a label file, the same share of every scene.")
    parser.add_argument("labels_file", metavar="FILE.csv")
    parser.add_argument("output", metavar="OUT.csv")
    parser.add_argument("--share", metavar="SHARE", type=float, required=True, help="above 0, below 1: such as 0.3")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="(default: 0)")
    parser.add_argument("--by", choices=("frames", "sequences"), default="frames",
                        help="what is drawn: single frames, or whole sequences (default: frames)")
    args = parser.parse_args()
    if not 0 < args.share < 1:
        raise UserError(f"--share {args.share:g}: must be above 0 and below 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be at least 0")
    if same_file(args.labels_file, args.output):
        raise UserError(f"{args.output} is the file to draw from, which stays as it is; name another")
    labels, description = read_labels(args.labels_file), describe(args.labels_file)
    part = subset(labels, args.share, args.seed, args.by)
    write_labels(args.output, part, description)
    counts = ", ".join(f"{scene} {(part['scene'] == scene).sum()} of {n}"
                       for scene, n in labels["scene"].value_counts(sort=False).items())
    print(f"{args.output}: {len(part)} of {len(labels)} frames: {counts}")


if __name__ == "__main__":
    cli.run(main)
