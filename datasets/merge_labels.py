"""One label file of several scenes under one root, for MS-Transformer.

    python -m datasets.merge_labels A.csv B.csv ... OUT.csv

Image paths stay as they are: all must be relative to one folder. What the JSON files beside them say goes to OUT.json,
where the scenes' names do not say it.
"""
import argparse
import os

import pandas as pd

from datasets.descriptions import read_convention, read_unit
from datasets.labels import read_labels, write_labels
from datasets.official import agreed_convention
from util import cli
from util.errors import UserError, first_five
from util.files import same_file


def merge(paths):
    """The labels of several files as one table, and their description, as descriptions.describe gives it.

    Raises UserError for files that share a scene or an image, and for units or conventions that differ.
    """
    tables = {path: read_labels(path) for path in paths}
    units = {path: read_unit(path) for path in paths}
    other = next((path for path in paths if units[path] != units[paths[0]]), None)
    if other is not None:
        raise UserError(f"{other}: positions in {units[other]}, but in {units[paths[0]]} in {paths[0]}; scale all "
                        f"scenes to metres")
    conventions = {path: found for path, table in tables.items() if (found := read_convention(path, table["scene"]))}
    convention = agreed_convention(conventions)
    for column, problem, advice in (("scene", "scene", "give each scene one file"),
                                    ("img_path", "image", "image paths must be relative to one folder of all scenes")):
        listed, twice = {}, []
        for path, table in tables.items():
            for name in dict.fromkeys(table[column].map(os.path.normpath if column == "img_path" else str)):
                first = listed.setdefault(name, path)
                if first != path:
                    twice.append(f"{path}: {problem} {name} is in {first} already; {advice}")
        if twice:
            raise UserError(first_five(twice))
    known = {"convention": convention} if len(conventions) == len(paths) else {}
    return pd.concat(tables.values(), ignore_index=True), {"unit": units[paths[0]], **known}


def main():
    """Merge the label files that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m datasets.merge_labels",
                                     description="Join label files of several scenes.")
    parser.add_argument("first", metavar="A.csv")
    parser.add_argument("others", metavar="B.csv", nargs="+")
    parser.add_argument("output", metavar="OUT.csv", help="the file to write; none of the others")
    args = parser.parse_args()
    paths = [args.first, *args.others]
    for path in paths:
        if same_file(path, args.output):
            raise UserError(f"{args.output} is a file to merge, which stays as it is; name another")
    for i, path in enumerate(paths):
        if any(same_file(path, before) for before in paths[:i]):
            raise UserError(f"{path} is given twice; give each file once")
    table, description = merge(paths)
    write_labels(args.output, table, description)
    unit = description["unit"]
    counts = ", ".join(f"{scene}: {n}" for scene, n in table["scene"].value_counts(sort=False).items())
    print(f"{args.output}: {len(table)} frames ({counts}), positions in {'metres' if unit == 'm' else unit}")


if __name__ == "__main__":
    cli.run(main)
