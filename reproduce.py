"""The papers' tables: published weights, tested by the scripts on every scene, beside the published medians.

    python reproduce.py TABLE --dataset_path DIR [--download] [--weights DIR]

TABLE is 7Scenes or CambridgeLandmarks (MS-Transformer and its PAE), 7Scenes-iAPR (iAPR trained on four shares of the
data) or PoseNet-KingsCollege (three backbones and their PAEs).
"""
import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.official import CAMBRIDGE, DATASETS, SEVEN_SCENES
from engine.scripts import pae_script, run_script
from engine.short import known_settings
from models import MULTI_SCENE_APRS, SINGLE_SCENE_APRS, SOLVERS, SOLVERS_WITH_NOISE
from models.checkpoints import describe, read_about, read_weights
from models.download import FILES, download_all
from util import cli
from util.errors import UserError
from util.files import sha256, whole_file
from util.progress import progress

ROOT = Path(__file__).resolve().parent
IAPR, POSENET = "7Scenes-iAPR", "PoseNet-KingsCollege"
TABLES = {**DATASETS, IAPR: SEVEN_SCENES, POSENET: CAMBRIDGE}  # {table: its dataset}
PREPARE = {SEVEN_SCENES.name: "datasets.prepare_7scenes", CAMBRIDGE.name: "datasets.prepare_cambridge"}
# {share of the training data: median errors of MS-Transformer and of iAPR}, means over the scenes of 7Scenes, from the
# README of the authors' repository.
SHARES = {100: ((0.18, 7.28), (0.17, 6.69)), 70: ((0.19, 7.41), (0.18, 7.10)), 50: ((0.19, 7.73), (0.18, 6.89)),
          30: ((0.20, 8.19), (0.19, 7.12))}


@dataclass
class Tested:
    """Weights that are tested on a scene.

    row: the table's row that the scene counts for. apr, encoder, iapr: weights, None for what is not tested.
    published: {'APR' or 'iAPR': median errors in metres and degrees}, of the row.
    """

    row: str
    scene: str
    apr: str
    encoder: str | None = None
    iapr: str | None = None
    published: dict = field(default_factory=dict)


def main():
    """Print and write the table that the command line asks for."""
    args = parse_arguments()
    dataset = TABLES[args.table]
    scenes = ["KingsCollege"] if args.table == POSENET else list(dataset.scenes)
    if args.download:
        download_all([name for name in weights_of(args) if name in FILES], args.weights)
        download_scenes(args, dataset, scenes)
    missing = scenes_without_files(args, dataset, scenes)
    if len(missing) == len(scenes):
        raise UserError(f"--dataset_path {args.dataset_path}, --labels_path {args.labels_path}: no scene of "
                        f"{dataset.name} exists there with its test labels ({', '.join(missing)}); --download fetches "
                        f"them")

    # All files are checked before the first test.
    everything = what_is_tested(args, dataset, [scene for scene in scenes if scene not in missing])
    models = {}
    for tested in everything:
        models[tested.apr] = models.get(tested.apr) or model_of(tested.apr)
        check_scene(args, tested, models[tested.apr][0])
        if tested.encoder:
            check_encoder(tested.encoder, args.solver)
    rows, n_earlier, n_tests = [], 0, 0
    for tested in progress(everything, unit="scene"):
        model, settings = models[tested.apr]
        row = {"row": tested.row}
        for name, command in commands(args, dataset, tested, model).items():
            medians, cost, is_earlier = result_of(args, dataset, tested, name, [*command, *settings])
            n_tests, n_earlier = n_tests + 1, n_earlier + is_earlier
            row |= columns_of(name, medians, tested.published.get(name) if model in MULTI_SCENE_APRS else None)
            row["minutes"] = row.get("minutes", 0) + cost["seconds"] / 60
            row["GiB"] = max(row.get("GiB", 0), cost["gib"])
        if "iAPR" in tested.published and not tested.iapr:
            row |= columns_of("iAPR", (np.nan, np.nan), tested.published["iAPR"])
        rows.append(row)
    if n_earlier:
        print(f"{n_earlier} of {n_tests} tests are of an earlier run, whose results are in {args.output_dir}")
    write_table(args, pd.DataFrame(rows), missing)


def parse_arguments():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description="Test published weights on every scene, beside the published medians.")
    parser.add_argument("table", metavar="TABLE", choices=TABLES, help=f"{', '.join(TABLES)}")
    parser.add_argument("--dataset_path", metavar="DIR", required=True,
                        help="the folder that image paths are relative to")
    parser.add_argument("--labels_path", metavar="DIR",
                        help="the folder of the label files (default: datasets/7Scenes or datasets/CambridgeLandmarks)")
    parser.add_argument("--weights", metavar="DIR", default="weights",
                        help="the folder of the published weights, as models.download names them (default: weights)")
    parser.add_argument("--download", action="store_true",
                        help="fetch the weights and scenes that are missing (default: no)")
    parser.add_argument("--yes", action="store_true", help="agree to the dataset's licence without being asked")
    parser.add_argument("--url", metavar="BASE", help="where to download the scenes from (default: the official place)")
    parser.add_argument("--apr_checkpoint", metavar="FILE.pth",
                        help="of the tables of a dataset: an APR's weights in place of the published ones; for one "
                             "model per scene, with {scene} in place of the scene's name")
    parser.add_argument("--encoder_checkpoint", metavar="FILE.pth",
                        help="its PAE's weights, as above (default: none with --apr_checkpoint)")
    parser.add_argument("--solver", choices=SOLVERS,
                        help="where a PAE is tested, refine with this solver of main_refine_apr.py optimize and the "
                             "scene's training labels as references; published PAEs need mlp or simplex (default: not "
                             "refined)")
    parser.add_argument("--cache_dir", metavar="DIR",
                        help="keep decoded frames in files of this folder (default: decode them for every test)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output_dir", metavar="DIR", default="out/reproduce",
                        help="where predictions and tables go, with logs and pictures in a folder per test; a test "
                             "whose result is there is not run again (default: out/reproduce)")
    args = parser.parse_args()
    args.labels_path = args.labels_path or f"datasets/{TABLES[args.table].name}"
    if args.table not in DATASETS and (args.apr_checkpoint or args.encoder_checkpoint):
        raise UserError(f"{args.table} is of published weights; leave --apr_checkpoint and --encoder_checkpoint out")
    if args.solver and (args.table == IAPR or (args.apr_checkpoint and not args.encoder_checkpoint)):
        raise UserError("--solver needs a PAE to refine with: --encoder_checkpoint, or the published weights")
    return args


def weights_of(args):
    """What a table takes of the published weights: {name: file}, with names that are not in FILES for lacking ones."""
    if args.table in DATASETS:
        stem = "7scenes" if args.table == SEVEN_SCENES.name else "cambridge"
        names = [] if args.apr_checkpoint else [f"ms_transformer_{stem}", f"pae_ms_transformer_{stem}"]
    elif args.table == IAPR:
        names = [f"{kind}_7scenes{of_share(share)}" for share in SHARES for kind in ("ms_transformer", "iapr")]
    else:
        names = [f"{kind}_{backbone}_kingscollege" for backbone in ("mobilenet", "resnet50", "efficientnet")
                 for kind in ("posenet", "pae_posenet")]
    return {name: os.path.join(args.weights, f"{name}.pth") for name in names}


def of_share(share):
    """What the files' names say of a share of the training data."""
    return "" if share == 100 else f"_{share}"


def download_scenes(args, dataset, scenes):
    """Download the scenes that are missing, or lack label files, by the dataset's own command."""
    missing = scenes_without_files(args, dataset, scenes)
    if missing:
        url = ["--url", args.url] if args.url else []
        process = subprocess.run([sys.executable, "-m", PREPARE[dataset.name], args.dataset_path, "--download", *url,
                                  *["--yes"] * args.yes, "--labels_path", args.labels_path, "--scenes", *missing],
                                 env={**os.environ, "PYTHONPATH": str(ROOT)})
        if process.returncode:
            sys.exit(process.returncode)  # its error is on the screen


def scenes_without_files(args, dataset, scenes):
    """Those of some scenes that have no folder, or no test labels."""
    return [scene for scene in scenes if not os.path.isdir(f"{args.dataset_path}/{scene}")
            or not os.path.isfile(f"{args.labels_path}/{dataset.label_file(scene, 'test')}")]


def what_is_tested(args, dataset, scenes):
    """A list of Tested. Raises UserError for published weights that are not there."""
    files = weights_of(args)
    for name, path in files.items():
        if name in FILES and not os.path.exists(path):
            raise UserError(f"{path}: no such file; --download, or python -m models.download {name}, fetches it")
    if args.table == IAPR:
        return [Tested(f"{share} %", scene, files[f"ms_transformer_7scenes{of_share(share)}"],
                       iapr=files[name] if (name := f"iapr_7scenes{of_share(share)}") in FILES else None,
                       published=dict(zip(("APR", "iAPR"), published)))
                for share, published in SHARES.items() for scene in scenes]
    if args.table == POSENET:
        names = list(files)
        return [Tested(apr.split("_")[1], scene, files[apr], files[encoder])
                for apr, encoder in zip(names[::2], names[1::2]) for scene in scenes]
    apr, encoder = list(files.values()) or (args.apr_checkpoint, args.encoder_checkpoint)
    if args.encoder_checkpoint:
        encoder = args.encoder_checkpoint
    return [Tested(scene, scene, apr.replace("{scene}", scene), encoder and encoder.replace("{scene}", scene),
                   published={"APR": dataset.medians[scene]}) for scene in scenes]


def model_of(path):
    """The name of the model whose weights a file holds, and the settings that it determines, for --set."""
    model, found = known_settings(path)
    settings = [f"{key}={found[key]}" for key in ("backbone_type", "hidden_dim", "dim_feedforward") if key in found]
    return model, ["--set", *settings]


def check_scene(args, tested, model):
    """Raise UserError for weights that cannot be tested on a scene."""
    if model in SINGLE_SCENE_APRS and tested.apr == args.apr_checkpoint:
        raise UserError(f"--apr_checkpoint {tested.apr}: a model of one scene; give the path of each scene's with "
                        "{scene} in the place of its name")
    trained_on = read_about(tested.apr).get("scene_names")
    if isinstance(trained_on, list) and tested.scene not in trained_on:
        raise UserError(f"{tested.apr}: trained on {', '.join(map(str, trained_on))}, as the JSON beside it says, not "
                        f"on {tested.scene}")


@functools.cache
def check_encoder(path, solver):
    """Raise UserError unless a file is a PAE that holds what the solver needs."""
    weights = read_weights(path)
    kind = describe(weights).get("kind", "no model known here")
    if not kind.endswith("PAE"):
        raise UserError(f"--encoder_checkpoint {path}: weights of {kind}, but a PAE's are needed")
    lacks_noise = solver in SOLVERS_WITH_NOISE and not ("noise" in weights and weights["noise"].any())
    if lacks_noise or (solver == "kernel" and not len(weights.get("memory.latents", ()))):
        kept = "covariance of latents" if lacks_noise else "memory of training frames"
        raise UserError(f"--encoder_checkpoint {path}: does not hold the {kept} that {solver} works with; choose "
                        "--solver mlp or simplex")


def commands(args, dataset, tested, model):
    """The tests of a scene: {'APR', 'PAE', 'refined' or 'iAPR': the command's arguments}."""
    labels, references = (f"{args.labels_path}/{dataset.label_file(tested.scene, split)}"
                          for split in ("test", "train"))
    found = {"APR": ("main.py", "test", "--checkpoint_path", tested.apr)}
    if tested.encoder:
        found["PAE"] = (pae_script(model), "test", tested.apr, "--encoder_checkpoint_path", tested.encoder)
    if tested.encoder and args.solver:
        found["refined"] = ("main_refine_apr.py", "optimize", tested.apr, tested.encoder, "--ref_poses_file",
                            references, "--solver", args.solver)
    if tested.iapr:
        found["iAPR"] = ("main_refine_apr.py", "test", tested.apr, "none", "--rpr_checkpoint_path", tested.iapr)
    options = ["--device", args.device, "--preset", dataset.name]
    options += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    return {name: [ROOT / script, model, mode, "none", args.dataset_path, labels, ROOT / "config.json", *weights,
                   *options] for name, (script, mode, *weights) in found.items()}


def result_of(args, dataset, tested, name, command):
    """Run a test, unless an earlier run has left its result, of the same command and the same files.

    Returns the median errors, metres and degrees, what it cost, {'seconds', 'gib': of memory}, and whether it is of an
    earlier run.
    """
    row = tested.row.replace(" %", "")
    stem = "_".join(dict.fromkeys((args.table, row, tested.scene, name.lower())))
    predictions, record = (f"{args.output_dir}/{stem}.{suffix}" for suffix in ("csv", "json"))
    about = {"command": list(map(str, command)),
             "files": {path: sha256(path) for path in map(str, command) if path.endswith((".pth", ".csv", ".json"))}}
    earlier = read_record(record)
    is_earlier = os.path.exists(predictions) and all(earlier.get(key) == value for key, value in about.items())
    cost = earlier.get("cost")
    if not is_earlier:
        begin = time.monotonic()
        try:
            lines = run_script(*command, "--predictions_path", predictions, "--output_dir",
                               f"{args.output_dir}/{stem}", capture_errors=True)
        except UserError as error:
            raise UserError(f"{tested.row}, {tested.scene}, {name}: {error}") from error
        cost = {"seconds": time.monotonic() - begin, "gib": peak_memory(lines)}
        with whole_file(record) as file:  # last: with it, the result is complete
            json.dump({**about, "cost": cost}, file, indent=2)
    table = pd.read_csv(predictions)
    return [table[error].median() for error in ("position_error_m", "orientation_error_deg")], cost, is_earlier


def read_record(path):
    """What an earlier run has written of a test; {} where there is nothing, or no such file."""
    try:
        with open(path) as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("cost"), dict) else {}


def peak_memory(lines):
    """The largest memory that a test's output names, in GiB: of the GPU where there is one."""
    found = [re.search(r"([\d.]+) GiB$", line) for line in lines if line.startswith("Peak memory: ")]
    return max((float(match[1]) for match in found if match), default=np.nan)


def columns_of(name, medians, published):
    """Cells of a row: the medians of a test in metres and degrees and, where there are any, the published ones."""
    more = "" if name == "APR" else f" {name}"
    cells = {}
    for unit, median, other in zip(("m", "deg"), medians, published or (None, None)):
        if other is not None:
            cells[f"published{more} {unit}"] = other
            cells[f"difference{more} {unit}"] = median - other
        cells[f"{name} {unit}"] = median
    order = [f"{kind} {unit}" for kind in (f"published{more}", name, f"difference{more}") for unit in ("m", "deg")]
    return {column: cells[column] for column in order if column in cells}


def write_table(args, tests, missing):
    """Print the table, and write it as CSV and Markdown. tests: a DataFrame with a row per scene."""
    how = {column: {"minutes": "sum", "GiB": "max"}.get(column, "mean") for column in tests.columns if column != "row"}
    table = tests.groupby("row", sort=False).agg(how).reset_index()
    if args.table in DATASETS:
        table.loc[len(table)] = {"row": "average", **table.agg(how)}
        table = table.rename(columns={"row": "scene"})
    text = markdown(table)
    if missing:
        text += f"\nNot on disk, and not in the average: {', '.join(missing)}\n"
    if args.table == IAPR:
        text += "\nMedians, averaged over the scenes. The weights of iAPR of 50 % are not published.\n"
    for suffix, content in (("csv", table.to_csv(index=False)), ("md", text)):
        with whole_file(f"{args.output_dir}/{args.table}.{suffix}") as file:
            file.write(content)
    print(f"\n{text}\n{args.output_dir}/{args.table}.csv, {args.table}.md")


def markdown(table):
    """A table in Markdown: a column of m / deg per kind of numbers, differences with their sign."""
    head, *rest = table.columns
    kinds = dict.fromkeys(column.rsplit(" ", 1)[0] for column in rest if column not in ("minutes", "GiB"))
    lines = [f"| {head} | {' | '.join(kinds)} | time, memory |", "|---" * (len(kinds) + 2) + "|"]
    for _, row in table.iterrows():
        cells = [row[head]]
        for kind in kinds:
            sign = "+" if kind.startswith("difference") else ""
            known = np.isfinite(row[f"{kind} m"])
            cells.append(f"{row[f'{kind} m']:{sign}.3f} m / {row[f'{kind} deg']:{sign}.2f} deg" if known else "-")
        lines.append(f"| {' | '.join(cells)} | {row['minutes']:.1f} min, {row['GiB']:.1f} GiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
