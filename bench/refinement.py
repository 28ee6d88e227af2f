"""How much refinement helps: APRs, PAEs and refiners trained by the scripts, and their poses refined in every way, on rendered scenes
and, where one is given, on a real one.

Takes hours on two CPU cores. What is done is kept in --folder, and the command goes on from there.
"""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import torch

from bench import common
from datasets.camera_poses import CameraPoseDataset
from datasets.labels import read_labels
from demo import AUXILIARY, MS_TRANSFORMER
from models import build_pose_encoder, load_apr
from models.checkpoints import fill, read_checkpoint
from models.pose_encoder import PoseEncoder
from models.pose_refiner import PoseRefiner
from util import cli, engine
from util.config import load_config
from util.latents import freeze, infer, queries_of
from util.metrics import changes, pose_err
from util.references import nearest_references, read_references
from util.refinement import optimize
from util.report import scene_names_of
from util.rotations import mean_quaternion, unit_poses

FRAMES, EPOCHS = 120, {"mobilenet": 10, "real": 20, "efficientnet": 6, "MS-Transformer": 6, "auxiliary": 100}
POSENET = ["batch_size=32", "n_workers=1"]
RENDERED = {"mobilenet": [f"n_epochs={EPOCHS['mobilenet']}", "lr_scheduler_step_size=4"],
            "efficientnet": [f"n_epochs={EPOCHS['efficientnet']}", "lr_scheduler_step_size=3"]}
REAL = [f"n_epochs={EPOCHS['real']}"]
MULTI_SCENE = [*MS_TRANSFORMER[1:], "n_workers=1", "batch_size=16", f"n_epochs={EPOCHS['MS-Transformer']}", "lr=1e-3",
               "lr_scheduler_step_size=2", "lr_scheduler_gamma=0.5", "s_x=-2", "s_q=-4"]
K = 3
MEAN, LEAKED = f"mean of {K} references", "LEAKED: paper's optimisation, references from the test labels"
SOLVED = {"paper's optimisation (mlp)": "mlp", "its minimum (simplex)": "simplex", "linear (default)": "linear", "inversion": "inversion",
          LEAKED: "mlp"}
METHODS = ["APR", "PAE", "nearest reference", MEAN, *list(SOLVED)[:-1], "learned refiner", LEAKED]
RECALLS = ((0.25, 5), (5, 10))  # metres, degrees


def run(*command):
    """Run a script; returns the last line that it prints, and ends this command where the script fails."""
    process = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return process.stdout.splitlines()[-1]


def train(folder, name, script, *arguments):
    """The weights FOLDER/NAME.pth, trained by a script unless they are there."""
    weights = f"{folder}/{name}.pth"
    if not os.path.exists(weights):
        trained = run(script, *arguments, "--output_dir", f"{folder}/runs").removeprefix("Weights: ")
        shutil.copy(trained.replace(".pth", ".json"), f"{folder}/{name}.json")
        os.replace(shutil.copy(trained, f"{weights}.part"), weights)
        print(weights, flush=True)
    return weights


def scenes(folder, real):
    """{scene: (dataset, training labels, test labels)}: rendered where they are not there yet, and the real one."""
    found = {}
    for kind, names in (("rooms", ("room-1", "room-2")), ("yard", ("yard-1",))):
        dataset = f"{folder}/data/{kind}"
        if not os.path.exists(dataset):
            shutil.rmtree(f"{dataset}.part", ignore_errors=True)
            run("-m", "datasets.synthetic_scenes", f"{dataset}.part", "--scenes", *(name[:-2] for name in names), "--frames", str(FRAMES))
            run("-m", "datasets.prepare_7scenes", f"{dataset}.part", "--labels_path", f"{dataset}.part/labels")
            os.rename(f"{dataset}.part", dataset)
        for name in names:
            found[name] = dataset, *(f"{dataset}/labels/abs_7scenes_pose.csv_{name}_{split}.csv" for split in ("train", "test"))
    return {**found, **({"real": tuple(real)} if real else {})}


def predict(folder, model, preset, settings, seed, dataset, training, test, trained_on, device):
    """Train what is missing for one APR, refine a scene's test frames in every way, and return {method: N x 7 poses} and the true
    poses. training: the scene's labels; trained_on: the labels, perhaps of more scenes, that the networks are trained on."""
    os.makedirs(folder, exist_ok=True)
    pae_script = "main_learn_pose_encoding.py" if model == "posenet" else "main_learn_multiscene_pose_encoding.py"

    def arguments(*weights):
        return [model, "train", "none", dataset, trained_on, "config.json", *weights, "--seed", str(seed), "--device", str(device),
                *(["--preset", preset] if preset else []), "--set", *settings]

    apr_path = train(folder, "apr", "main.py", *arguments())
    pae_path = train(folder, "pae", pae_script, *arguments(apr_path), *AUXILIARY)
    refiner_path = train(folder, "refiner", "main_refine_apr.py", *arguments(apr_path, pae_path), *AUXILIARY)

    config = load_config("config.json", model, ("pose_encoder", "refiner"), preset, settings)
    names = scene_names_of(model, config, apr_path)
    apr = load_apr(model, "none", config, apr_path).to(device)
    frames = CameraPoseDataset(dataset, test, scene_names=names, origin=apr.origin)
    encoder = build_pose_encoder(model, config, pae_path).to(device)
    refiner = PoseRefiner(config["hidden_dim"]).to(device)
    fill(refiner_path, refiner, read_checkpoint(refiner_path, "refiner", config))
    freeze(apr, encoder, refiner)
    run = SimpleNamespace(args=SimpleNamespace(cache_dir=None), config={**config, "n_workers": 0}, device=device)
    queries = queries_of({key: value.to(device) for key, value in
                          engine.evaluate(run, lambda batch: infer(apr, batch["img"]), frames).items()})

    def references_of(path, leaked=False):
        poses, scenes, _ = read_references(path, frames, names, None if model == "posenet" else config["num_scenes"], leaked)
        return poses.to(device), scenes.to(device)

    references = references_of(trained_on)
    poses = {"APR": queries["pose"], "learned refiner": refiner(queries["latents"], queries["pose"]),
             "PAE": apr.regress(*encoder(queries["pose"], queries["scene"]))}
    nearest = nearest_references(queries["pose"], queries["scene"], *references, K)
    poses["nearest reference"] = references[0][nearest[:, 0]]
    poses[MEAN] = torch.cat((references[0][nearest, :3].mean(dim=1), mean_quaternion(references[0][nearest, 3:])), dim=1)
    for method, solver in SOLVED.items():
        given = references_of(test, leaked=True) if method == LEAKED else references
        poses[method], _ = optimize(solver, encoder, queries, *given, {**config, "num_neighbors": K}, seed)
    return {method: tensor.cpu() for method, tensor in poses.items()}, frames.poses


def rows_of(title, runs):
    """Rows of the table. runs: a list, an APR each, of lists, a scene each, of (poses of the methods, true poses)."""
    rows = []
    errors = {method: np.stack([np.concatenate([np.stack(pose_err(poses[method], truth)) for poses, truth in of_scenes], axis=1)
                                for of_scenes in runs], axis=1) for method in METHODS}  # each 2 x APRs x frames
    for method, (position, orientation) in errors.items():
        row = {"data": title, "method": method, "position m": float(np.median(position)),
               "orientation deg": float(np.median(orientation))}
        for name, (change, low, high) in zip(("position", "orientation"), changes(errors["APR"], (position, orientation))):
            row[f"change of {name}"] = "" if method == "APR" else f"{change:+.0f} % ({low:+.0f} to {high:+.0f})"
        for metres, degrees in RECALLS:
            row[f"within {metres} m/{degrees} deg"] = f"{100 * np.mean((position <= metres) & (orientation <= degrees)):.0f} %"
        rows.append(row)
    return rows


@torch.no_grad()
def costs(device):
    """Rows: how long each solver takes for 1000 queries and 7000 references, the PAE's encodings of these included."""
    torch.manual_seed(0)
    encoder = PoseEncoder(256, octaves=4).to(device)
    queries = {"pose": torch.randn(1000, 7).to(device), "latents": torch.randn(1000, 512).to(device),
               "scene": torch.zeros(1000, dtype=torch.long, device=device)}
    references, scenes = unit_poses(torch.randn(7000, 7)).to(device), torch.zeros(7000, dtype=torch.long, device=device)
    rows = []
    for solver in dict.fromkeys(SOLVED.values()):
        optimize(solver, encoder, {key: value[:1] for key, value in queries.items()}, references, scenes, {})  # warm up
        taken, _ = engine.milliseconds(lambda: optimize(solver, encoder, queries, references, scenes, {}), device)
        rows.append({"solver": solver, "queries": 1000, "references": 7000, "s": taken / 1000})
    return rows


def main():
    parser = common.parser("refinement", __doc__)
    parser.add_argument("--folder", default="out/bench/refinement", help="(default: out/bench/refinement)")
    parser.add_argument("--real", nargs=3, metavar=("DATASET", "TRAIN.csv", "TEST.csv"), help="a real scene (default: none)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="how often PoseNet with MobileNetV2 is trained (default: 3)")
    parser.add_argument("--only", metavar="BACKBONE", nargs="+", default=["mobilenet", "efficientnet", "ms-transformer"],
                        help="(default: mobilenet efficientnet ms-transformer)")
    args = parser.parse_args()
    found = scenes(args.folder, args.real)

    device = cli.device_of(args.device)

    def posenet(backbone, seed, scene):
        dataset, training, test = found[scene]
        return predict(f"{args.folder}/{scene}-{backbone}-{seed}", "posenet", "7Scenes",
                       [*POSENET, f"backbone_type={backbone}", *(REAL if scene == "real" else RENDERED[backbone])], seed, dataset, training,
                       test, training, device)

    groups = {"rooms": ["room-1", "room-2"], "yard": ["yard-1"], **({"real": ["real"]} if args.real else {})}
    table = []
    if "mobilenet" in args.only:
        for title, names in groups.items():
            runs = [[posenet("mobilenet", seed, name) for name in names] for seed in range(args.seeds)]
            table += rows_of(f"{title}, MobileNetV2 x {args.seeds}", runs)
    if "efficientnet" in args.only:
        table += rows_of("rooms, EfficientNet-B0", [[posenet("efficientnet", 0, name) for name in groups["rooms"]]])
    if "ms-transformer" in args.only:
        all_training = f"{args.folder}/data/rooms/labels/7scenes_all_scenes.csv"
        table += rows_of("rooms, MS-Transformer", [[predict(
            f"{args.folder}/rooms-ms-transformer-0", "ems-transposenet", None, MULTI_SCENE, 0, *found[name], all_training, device)
            for name in groups["rooms"]]])
    setting = [{"scene": scene, **{f"{split} frames": len(read_labels(path)) for split, path in zip(("training", "test"), paths)}}
               for scene, (_, *paths) in found.items()]
    common.show(args, {"Cost": costs(device), f"Frames; epochs of the APRs {EPOCHS['mobilenet']} (real scene {EPOCHS['real']}, EfficientNet-B0 and "
                       f"MS-Transformer {EPOCHS['MS-Transformer']}), of PAE and refiner {EPOCHS['auxiliary']}": setting,
                       "Refinement: medians, changes against the APR with 95 % intervals, recall": table})


if __name__ == "__main__":
    cli.run(main)
