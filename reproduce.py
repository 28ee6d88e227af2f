"""The papers' tables: every scene of a dataset, tested by the scripts, beside the published medians.

    python reproduce.py {7Scenes,CambridgeLandmarks} --dataset_path DIR --apr_checkpoint FILE
        [--encoder_checkpoint FILE] [--solver NAME]
"""
import argparse
import os
from pathlib import Path

import pandas as pd

from datasets.official import DATASETS
from engine.scripts import pae_script, run_script
from engine.short import known_settings
from models import SINGLE_SCENE_APRS, SOLVERS, SOLVERS_WITH_NOISE
from models.checkpoints import describe, read_about, read_weights
from util import cli
from util.errors import UserError
from util.files import whole_file
from util.progress import progress

ROOT = Path(__file__).resolve().parent


def main():
    """Print and write the table that the command line asks for."""
    args = parse_arguments()
    if args.solver and not args.encoder_checkpoint:
        raise UserError("--solver needs --encoder_checkpoint, the PAE to refine with")
    dataset = DATASETS[args.dataset]
    labels_path = args.labels_path or f"datasets/{dataset.name}"
    scenes = [scene for scene in dataset.scenes if os.path.isdir(f"{args.dataset_path}/{scene}")
              and os.path.isfile(f"{labels_path}/{dataset.label_file(scene, 'test')}")]
    missing = [scene for scene in dataset.scenes if scene not in scenes]
    if not scenes:
        raise UserError(f"--dataset_path {args.dataset_path}, --labels_path {labels_path}: no scene of {dataset.name} "
                        f"exists there with its test labels ({', '.join(missing)})")

    # All files are checked before the first test.
    models = {scene: model_of(args.apr_checkpoint, scene) for scene in scenes}
    for scene in scenes if args.encoder_checkpoint else ():
        check_encoder(args.encoder_checkpoint.replace("{scene}", scene), args.solver)
    rows = []
    for scene, (model, settings) in progress(models.items(), unit="scene"):
        medians = test_scene(args, labels_path, scene, model, settings)
        row = {"scene": scene}
        if model not in SINGLE_SCENE_APRS:
            published = dataset.medians[scene]
            row |= columns("published", published) | columns("APR", medians["APR"])
            row |= columns("difference", [ours - theirs for ours, theirs in zip(medians["APR"], published)])
        for name in medians:
            row |= columns(name, medians[name])
        rows.append(row)
    table = pd.DataFrame(rows)
    table.loc[len(table)] = {"scene": "average", **table.drop(columns="scene").mean()}
    text = markdown(table)
    if missing:
        text += f"\nNot on disk, and not in the average: {', '.join(missing)}\n"
    for suffix, content in (("csv", table.to_csv(index=False)), ("md", text)):
        with whole_file(f"{args.output_dir}/{dataset.name}.{suffix}") as file:
            file.write(content)
    print(f"\n{text}\n{args.output_dir}/{dataset.name}.csv, {dataset.name}.md")


def parse_arguments():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description="Test every scene of a dataset, beside the published medians.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--dataset_path", metavar="DIR", required=True,
                        help="the folder that image paths are relative to")
    parser.add_argument("--labels_path", metavar="DIR",
                        help="the folder of the label files (default: datasets/DATASET)")
    parser.add_argument("--apr_checkpoint", metavar="FILE.pth", required=True,
                        help="the APR's weights; for one model per scene, with {scene} in place of the scene's name")
    parser.add_argument("--encoder_checkpoint", metavar="FILE.pth",
                        help="its PAE's weights, as above (default: no PAE is tested)")
    parser.add_argument("--solver", choices=SOLVERS,
                        help="refine with this solver of main_refine_apr.py optimize and the scene's training labels "
                             "as references; published PAEs need mlp or simplex (default: not refined)")
    parser.add_argument("--cache_dir", metavar="DIR",
                        help="keep decoded frames in files of this folder (default: decode them for every test)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output_dir", metavar="DIR", default="out/reproduce",
                        help="where predictions and tables go, with logs and pictures in a folder per test (default: "
                             "out/reproduce)")
    return parser.parse_args()


def model_of(checkpoint, scene):
    """The name of the model whose weights are tested on a scene, and the settings that its file determines."""
    path = checkpoint.replace("{scene}", scene)
    model, found = known_settings(path)
    if model in SINGLE_SCENE_APRS and path == checkpoint:
        raise UserError(f"--apr_checkpoint {path}: a model of one scene; give the path of each scene's with {{scene}} "
                        "in the place of its name")
    trained_on = read_about(path).get("scene_names")
    if isinstance(trained_on, list) and scene not in trained_on:
        raise UserError(f"--apr_checkpoint {path}: trained on {', '.join(map(str, trained_on))}, as the JSON beside it "
                        f"says, not on {scene}")
    return model, [f"{key}={found[key]}" for key in ("backbone_type", "hidden_dim", "dim_feedforward") if key in found]


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


def test_scene(args, labels_path, scene, model, settings):
    """Test a scene by the scripts.

    Returns the median errors, {'APR': (metres, degrees)}, with 'PAE' and 'refined' where they are asked for.
    """
    dataset = DATASETS[args.dataset]
    apr, encoder = (path and path.replace("{scene}", scene) for path in (args.apr_checkpoint, args.encoder_checkpoint))
    labels, references = (f"{labels_path}/{dataset.label_file(scene, split)}" for split in ("test", "train"))
    tests = {"APR": ("main.py", "test", "--checkpoint_path", apr)}
    if encoder:
        tests["PAE"] = (pae_script(model), "test", apr, "--encoder_checkpoint_path", encoder)
    if args.solver:
        tests["refined"] = ("main_refine_apr.py", "optimize", apr, encoder, "--ref_poses_file", references,
                            "--solver", args.solver)
    options = ["--device", args.device, "--preset", dataset.name]
    options += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    options += ["--set", *settings] if settings else []
    results = {}
    for name, (script, mode, *weights) in tests.items():
        predictions = f"{args.output_dir}/{dataset.name}_{scene}_{name.lower()}.csv"
        try:
            run_script(ROOT / script, model, mode, "none", args.dataset_path, labels, ROOT / "config.json", *weights,
                       "--predictions_path", predictions, "--output_dir", predictions.removesuffix(".csv"), *options,
                       capture_errors=True)
        except UserError as error:
            raise UserError(f"{scene}, {name}: {error}") from error
        table = pd.read_csv(predictions)
        results[name] = (table["position_error_m"].median(), table["orientation_error_deg"].median())
    return results


def columns(name, medians):
    """Two cells of a row: median errors in metres and degrees."""
    return {f"{name} m": medians[0], f"{name} deg": medians[1]}


def markdown(table):
    """A table in Markdown: a column of m / deg per kind of numbers, differences with their sign."""
    kinds = dict.fromkeys(column.rsplit(" ", 1)[0] for column in table.columns if column != "scene")
    lines = [f"| scene | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for _, row in table.iterrows():
        cells = [row["scene"]]
        for kind in kinds:
            sign = "+" if kind == "difference" else ""
            cells.append(f"{row[f'{kind} m']:{sign}.3f} m / {row[f'{kind} deg']:{sign}.2f} deg")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
