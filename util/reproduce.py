"""The papers' tables: every scene of a dataset, tested by the scripts, beside the published medians.

    python -m util.reproduce {7Scenes,CambridgeLandmarks} --dataset_path DIR --apr_checkpoint FILE
        [--encoder_checkpoint FILE] [--solver NAME]
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from main_refine_apr import NEED_NOISE, SOLVERS
from models import APR_NAMES, SINGLE_SCENE_APRS
from models.checkpoints import describe, read_about, read_weights
from util.errors import UserError
from util.files import whole_file
from util.progress import progress

ROOT = Path(__file__).resolve().parent.parent
LABELS = {"7Scenes": "abs_7scenes_pose.csv_{scene}_{split}.csv",
          "CambridgeLandmarks": "abs_cambridge_pose_sorted.csv_{scene}_{split}.csv"}
# MS-Transformer's medians, metres and degrees (Shavit, Ferens & Keller, ICCV 2021, tables 1 and 2).
PUBLISHED = {
    "7Scenes": {"chess": (0.11, 4.66), "fire": (0.24, 9.60), "heads": (0.14, 12.19), "office": (0.17, 5.66), "pumpkin": (0.18, 4.44),
                "redkitchen": (0.17, 5.94), "stairs": (0.26, 8.45)},
    "CambridgeLandmarks": {"KingsCollege": (0.83, 1.47), "OldHospital": (1.81, 2.39), "ShopFacade": (0.86, 3.07),
                           "StMarysChurch": (1.62, 3.99)},
}


def main():
    parser = argparse.ArgumentParser(prog="python -m util.reproduce", description="Test every scene of a dataset, beside the published medians.")
    parser.add_argument("dataset", choices=LABELS)
    parser.add_argument("--dataset_path", metavar="DIR", required=True, help="the folder that image paths are relative to")
    parser.add_argument("--labels_path", metavar="DIR", help="the folder of the label files (default: datasets/DATASET)")
    parser.add_argument("--apr_checkpoint", metavar="FILE.pth", required=True,
                        help="the APR's weights; for a model a scene with {scene} in the place of the scene's name")
    parser.add_argument("--encoder_checkpoint", metavar="FILE.pth", help="its PAE's weights, as above (default: no PAE is tested)")
    parser.add_argument("--solver", choices=SOLVERS, help="refine with this solver of main_refine_apr.py optimize, with the scene's training "
                                                          "labels as references; published PAEs need mlp or simplex (default: not refined)")
    parser.add_argument("--cache_dir", metavar="DIR", help="keep decoded frames in files of this folder (default: decode them for every test)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output_dir", metavar="DIR", default="out/reproduce", help="where predictions and tables go, and in a folder a test logs and pictures (default: out/reproduce)")
    args = parser.parse_args()
    if args.solver and not args.encoder_checkpoint:
        raise UserError("--solver needs --encoder_checkpoint, the PAE to refine with")
    labels_path = args.labels_path or f"datasets/{args.dataset}"
    scenes, missing = [], []
    for scene in PUBLISHED[args.dataset]:
        here = os.path.isdir(f"{args.dataset_path}/{scene}") and os.path.isfile(labels_of(labels_path, args.dataset, scene, "test"))
        (scenes if here else missing).append(scene)
    if not scenes:
        raise UserError(f"--dataset_path {args.dataset_path}, --labels_path {labels_path}: no scene of {args.dataset} is there with its test "
                        f"labels ({', '.join(missing)})")

    models = {scene: model_of(args.apr_checkpoint, scene) for scene in scenes}
    for scene in scenes if args.encoder_checkpoint else ():
        check_encoder(args.encoder_checkpoint.replace("{scene}", scene), args.solver)
    rows = []
    for scene, (model, settings) in progress(models.items(), unit="scene"):
        medians = test(args, labels_path, scene, model, settings)
        row = {"scene": scene}
        if model not in SINGLE_SCENE_APRS:
            published = PUBLISHED[args.dataset][scene]
            row |= columns("published", published) | columns("APR", medians["APR"])
            row |= columns("difference", [ours - theirs for ours, theirs in zip(medians["APR"], published)])
        for name in medians:
            row |= columns(name, medians[name])
        rows.append(row)
    table = pd.DataFrame(rows)
    average = table.drop(columns="scene").mean()
    table.loc[len(table)] = {"scene": "average", **average}
    text = markdown(table)
    if missing:
        text += f"\nNot on disk, and not in the average: {', '.join(missing)}\n"
    for suffix, content in (("csv", table.to_csv(index=False)), ("md", text)):
        with whole_file(f"{args.output_dir}/{args.dataset}.{suffix}") as file:
            file.write(content)
    print(f"\n{text}\n{args.output_dir}/{args.dataset}.csv, {args.dataset}.md")


def model_of(checkpoint, scene):
    """The model whose weights are tested on a scene, by name, and the settings that its file determines."""
    path = checkpoint.replace("{scene}", scene)
    found = describe(read_weights(path))
    model = found.get("kind")
    if model not in APR_NAMES:
        raise UserError(f"--apr_checkpoint {path}: {f'a checkpoint of {model}' if model else 'weights of no model known here'}, but an APR's "
                        "is needed")
    if model in SINGLE_SCENE_APRS and path == checkpoint:
        raise UserError(f"--apr_checkpoint {path}: a model of one scene; give the path of each scene's with {{scene}} in the place of its name")
    trained_on = read_about(path).get("scene_names")
    if isinstance(trained_on, list) and scene not in trained_on:
        raise UserError(f"--apr_checkpoint {path}: trained on {', '.join(map(str, trained_on))}, as the JSON beside it says, not on {scene}")
    return model, [f"{key}={found[key]}" for key in ("backbone_type", "hidden_dim", "dim_feedforward") if key in found]


def check_encoder(path, solver):
    """Raise UserError unless a file is a PAE, with what the solver needs: all of them before the first test."""
    weights = read_weights(path)
    kind = describe(weights).get("kind", "no model known here")
    if not kind.endswith("PAE"):
        raise UserError(f"--encoder_checkpoint {path}: weights of {kind}, but a PAE's are needed")
    if solver in NEED_NOISE and not ("noise" in weights and weights["noise"].any()):
        raise UserError(f"--encoder_checkpoint {path}: does not hold the covariance of latents that {solver} works with; choose --solver mlp or simplex")


def test(args, labels_path, scene, model, settings):
    """Test a scene by the scripts. Returns {'APR': (median position error in metres, orientation error in degrees)}, and 'PAE' and
    'refined' where they are asked for."""
    checkpoint, encoder = (path and path.replace("{scene}", scene) for path in (args.apr_checkpoint, args.encoder_checkpoint))
    labels = {split: labels_of(labels_path, args.dataset, scene, split) for split in ("train", "test")}
    pae_script = "main_learn_pose_encoding.py" if model in SINGLE_SCENE_APRS else "main_learn_multiscene_pose_encoding.py"
    tests = {"APR": ("main.py", "test", "--checkpoint_path", checkpoint)}
    if encoder:
        tests["PAE"] = (pae_script, "test", checkpoint, "--encoder_checkpoint_path", encoder)
    if args.solver:
        tests["refined"] = ("main_refine_apr.py", "optimize", checkpoint, encoder, "--ref_poses_file", labels["train"], "--solver", args.solver)
    results = {}
    for name, (script, mode, *more) in tests.items():
        predictions = f"{args.output_dir}/{args.dataset}_{scene}_{name.lower()}.csv"
        command = [ROOT / script, model, mode, "none", args.dataset_path, labels["test"], ROOT / "config.json", *more,
                   "--predictions_path", predictions, "--output_dir", predictions.removesuffix(".csv"), "--device", args.device,
                   *(["--cache_dir", args.cache_dir] if args.cache_dir else []), "--preset", args.dataset, *(["--set", *settings] if settings else [])]
        status, stderr = run(command)
        if status:
            raise UserError(f"{scene}, {name}: {(stderr.strip().splitlines() or ['the test has failed'])[-1]}")
        table = pd.read_csv(predictions)
        results[name] = (table["position_error_m"].median(), table["orientation_error_deg"].median())
    return results


def run(command):
    """Run a script; returns its exit status and what it wrote to stderr."""
    process = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return process.returncode, process.stderr


def columns(name, medians):
    return {f"{name} m": medians[0], f"{name} deg": medians[1]}


def labels_of(labels_path, dataset, scene, split):
    return os.path.join(labels_path, LABELS[dataset].format(scene=scene, split=split))


def markdown(table):
    """A table in Markdown: a column of 'm/deg' for each kind of number, differences with their sign."""
    kinds = dict.fromkeys(column.rsplit(" ", 1)[0] for column in table.columns if column != "scene")
    lines = [f"| scene | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for _, row in table.iterrows():
        sign = {kind: "+" if kind == "difference" else "" for kind in kinds}
        lines.append(f"| {row['scene']} | " + " | ".join(
            f"{row[f'{kind} m']:{sign[kind]}.3f} m / {row[f'{kind} deg']:{sign[kind]}.2f} deg" for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from util import cli

    cli.run(main)
