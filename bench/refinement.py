"""How much refinement helps: APRs, PAEs and refiners trained by the scripts, and their poses refined in every way, on
rendered scenes and, where one is given, on a real one.

It takes hours on two CPU cores. --folder keeps what is finished, and the command continues from there.
"""
import os
import shutil
from functools import partial

import numpy as np
import torch

from bench import common
from datasets.camera_poses import CameraPoseDataset
from datasets.labels import read_labels
from datasets.official import SEVEN_SCENES
from datasets.references import read_references
from demo import AUXILIARY, MS_TRANSFORMER
from engine.evaluation import evaluate, milliseconds
from engine.report import scene_names_of
from engine.run import Run, device_of
from engine.scripts import pae_script, run_script
from models import build_pose_encoder, freeze, infer, load_apr
from models.checkpoints import fill, read_checkpoint
from models.pose_encoder import PoseEncoder
from models.pose_refiner import PoseRefiner
from models.refinement import nearest_references, optimize, queries_of
from util import cli
from util.config import Config, load_config
from util.metrics import changes, pose_err
from util.rotations import mean_quaternion, unit_poses

FRAMES, EPOCHS = 120, {"mobilenet": 10, "real": 20, "efficientnet": 6, "MS-Transformer": 6, "auxiliary": 100}
POSENET = ["batch_size=32", "n_workers=1"]
RENDERED = {"mobilenet": [f"n_epochs={EPOCHS['mobilenet']}", "lr_scheduler_step_size=4"],
            "efficientnet": [f"n_epochs={EPOCHS['efficientnet']}", "lr_scheduler_step_size=3"]}
REAL = [f"n_epochs={EPOCHS['real']}"]
MULTI_SCENE = [*MS_TRANSFORMER[1:], "n_workers=1", "batch_size=16", f"n_epochs={EPOCHS['MS-Transformer']}", "lr=1e-3",
               "lr_scheduler_step_size=2", "lr_scheduler_gamma=0.5", "s_x=-2", "s_q=-4"]
K = 3
N_QUERIES, N_REFERENCES = 1000, 7000  # of the costs
MEAN, LEAKED = f"mean of {K} references", "LEAKED: paper's optimisation, references from the test labels"
SOLVED = {"paper's optimisation (mlp)": "mlp", "its minimum (simplex)": "simplex", "linear (default)": "linear",
          "inversion": "inversion", LEAKED: "mlp"}
METHODS = ["APR", "PAE", "nearest reference", MEAN, *list(SOLVED)[:-1], "learned refiner", LEAKED]
RECALLS = ((0.25, 5), (5, 10))  # metres, degrees


def train(folder, name, script, *arguments):
    """The weights FOLDER/NAME.pth, trained by a script unless they exist."""
    weights = f"{folder}/{name}.pth"
    if not os.path.exists(weights):
        trained = run_script(script, *arguments, "--output_dir", f"{folder}/runs")[-1].removeprefix("Weights: ")
        shutil.copy(trained.replace(".pth", ".json"), f"{folder}/{name}.json")
        os.replace(shutil.copy(trained, f"{weights}.part"), weights)
        print(weights, flush=True)
    return weights


def scenes(folder, real):
    """{scene: (dataset, training labels, test labels)}: rendered scenes, made unless they exist, and the real one."""
    found = {}
    for kind, names in (("rooms", ("room-1", "room-2")), ("yard", ("yard-1",))):
        dataset = f"{folder}/data/{kind}"
        if not os.path.exists(dataset):
            part = f"{dataset}.part"
            shutil.rmtree(part, ignore_errors=True)
            run_script("-m", "datasets.synthetic_scenes", part, "--scenes", *(name[:-2] for name in names), "--frames",
                       FRAMES)
            run_script("-m", "datasets.prepare_7scenes", part, "--labels_path", f"{part}/labels")
            os.rename(part, dataset)
        for name in names:
            labels = (f"{dataset}/labels/{SEVEN_SCENES.label_file(name, split)}" for split in ("train", "test"))
            found[name] = dataset, *labels
    return {**found, **({"real": tuple(real)} if real else {})}


def predict(folder, model, preset, settings, seed, dataset, training, test, trained_on, device):
    """Train what is missing for one APR, and refine a scene's test frames in every way.

    training: the scene's training labels. trained_on: those that the networks are trained on, perhaps of more scenes.
    Returns {method: N x 7 poses}, and the true poses.
    """
    os.makedirs(folder, exist_ok=True)

    def arguments(*weights):
        return [model, "train", "none", dataset, trained_on, "config.json", *weights, "--seed", seed,
                "--device", device, *(["--preset", preset] if preset else []), "--set", *settings]

    apr_path = train(folder, "apr", "main.py", *arguments())
    pae_path = train(folder, "pae", pae_script(model), *arguments(apr_path), *AUXILIARY)
    refiner_path = train(folder, "refiner", "main_refine_apr.py", *arguments(apr_path, pae_path), *AUXILIARY)

    config = load_config("config.json", model, ("pose_encoder", "refiner"), preset, settings)
    names = scene_names_of(model, config, apr_path)
    apr = load_apr(model, "none", config, apr_path).to(device)
    frames = CameraPoseDataset(dataset, test, scene_names=names, origin=apr.origin)
    encoder = build_pose_encoder(model, config, pae_path).to(device)
    refiner = PoseRefiner(config["hidden_dim"]).to(device)
    fill(refiner_path, refiner, read_checkpoint(refiner_path, "refiner", config))
    freeze(apr, encoder, refiner)
    run = Run(Config({**config, "n_workers": 0}), device)
    results = evaluate(run, lambda batch: infer(apr, batch["img"]), frames)
    queries = queries_of({key: value.to(device) for key, value in results.items()})

    def references_of(path, leaked=False):
        num_scenes = None if model == "posenet" else config["num_scenes"]
        poses, scenes, _ = read_references(path, frames, names, num_scenes, leaked)
        return poses.to(device), scenes.to(device)

    references = references_of(trained_on)
    poses = {"APR": queries["pose"], "learned refiner": refiner(queries["latents"], queries["pose"]),
             "PAE": apr.regress(*encoder(queries["pose"], queries["scene"]))}
    nearest = references[0][nearest_references(queries["pose"], queries["scene"], *references, K)]
    poses["nearest reference"] = nearest[:, 0]
    poses[MEAN] = torch.cat((nearest[..., :3].mean(dim=1), mean_quaternion(nearest[..., 3:])), dim=1)
    for method, solver in SOLVED.items():
        given = references_of(test, leaked=True) if method == LEAKED else references
        poses[method], _ = optimize(solver, encoder, queries, *given, {**config, "num_neighbors": K}, seed)
    return {method: tensor.cpu() for method, tensor in poses.items()}, frames.poses


def rows_of(title, runs):
    """Rows of the table. runs: per APR, and in it per scene, (poses of the methods, true poses)."""
    rows = []
    errors = {method: np.stack([np.concatenate([np.stack(pose_err(poses[method], truth)) for poses, truth in of_scenes],
                                               axis=1) for of_scenes in runs], axis=1)
              for method in METHODS}  # each 2 x APRs x frames
    for method, (position, orientation) in errors.items():
        row = {"data": title, "method": method, "position m": float(np.median(position)),
               "orientation deg": float(np.median(orientation))}
        intervals = changes(errors["APR"], (position, orientation))
        for name, (change, low, high) in zip(("position", "orientation"), intervals):
            row[f"change of {name}"] = "" if method == "APR" else f"{change:+.0f} % ({low:+.0f} to {high:+.0f})"
        for metres, degrees in RECALLS:
            recall = np.mean((position <= metres) & (orientation <= degrees))
            row[f"within {metres} m/{degrees} deg"] = f"{100 * recall:.0f} %"
        rows.append(row)
    return rows


@torch.no_grad()
def costs(device):
    """Rows of a table: the time of each solver for all queries, encoding the references included."""
    torch.manual_seed(0)
    encoder = PoseEncoder(256, octaves=4).to(device)
    queries = {"pose": torch.randn(N_QUERIES, 7).to(device), "latents": torch.randn(N_QUERIES, 512).to(device),
               "scene": torch.zeros(N_QUERIES, dtype=torch.long, device=device)}
    references = unit_poses(torch.randn(N_REFERENCES, 7)).to(device)
    scenes = torch.zeros(N_REFERENCES, dtype=torch.long, device=device)
    rows = []
    for solver in dict.fromkeys(SOLVED.values()):
        solve = partial(optimize, solver, encoder, references=references, reference_scenes=scenes, config={})
        solve({key: value[:1] for key, value in queries.items()})  # warm up
        elapsed_ms, _ = milliseconds(partial(solve, queries), device)
        rows.append({"solver": solver, "queries": N_QUERIES, "references": N_REFERENCES, "s": elapsed_ms / 1000})
    return rows


def parse_arguments():
    """The command line's arguments."""
    parser = common.parser("refinement", __doc__)
    parser.add_argument("--folder", default="out/bench/refinement", help="(default: out/bench/refinement)")
    parser.add_argument("--real", nargs=3, metavar=("DATASET", "TRAIN.csv", "TEST.csv"),
                        help="a real scene (default: none)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3,
                        help="how often PoseNet with MobileNetV2 is trained (default: 3)")
    parser.add_argument("--only", metavar="BACKBONE", nargs="+",
                        default=["mobilenet", "efficientnet", "ms-transformer"],
                        help="(default: mobilenet efficientnet ms-transformer)")
    return parser.parse_args()


def main():
    """Run the benchmark that the command line asks for."""
    args = parse_arguments()
    found = scenes(args.folder, args.real)
    device = device_of(args.device)

    def posenet(backbone, seed, scene):
        dataset, training, test = found[scene]
        settings = [*POSENET, f"backbone_type={backbone}", *(REAL if scene == "real" else RENDERED[backbone])]
        return predict(f"{args.folder}/{scene}-{backbone}-{seed}", "posenet", "7Scenes", settings, seed, dataset,
                       training, test, training, device)

    def ms_transformer(scene):
        all_training = f"{args.folder}/data/rooms/labels/{SEVEN_SCENES.all_scenes_file}"
        return predict(f"{args.folder}/rooms-ms-transformer-0", "ems-transposenet", None, MULTI_SCENE, 0, *found[scene],
                       all_training, device)

    groups = {"rooms": ["room-1", "room-2"], "yard": ["yard-1"], **({"real": ["real"]} if args.real else {})}
    table = []
    if "mobilenet" in args.only:
        for title, names in groups.items():
            runs = [[posenet("mobilenet", seed, name) for name in names] for seed in range(args.seeds)]
            table += rows_of(f"{title}, MobileNetV2 x {args.seeds}", runs)
    if "efficientnet" in args.only:
        table += rows_of("rooms, EfficientNet-B0", [[posenet("efficientnet", 0, name) for name in groups["rooms"]]])
    if "ms-transformer" in args.only:
        table += rows_of("rooms, MS-Transformer", [[ms_transformer(name) for name in groups["rooms"]]])
    frames = [{"scene": scene, "training frames": len(read_labels(training)), "test frames": len(read_labels(test))}
              for scene, (_, training, test) in found.items()]
    epochs = (f"{EPOCHS['mobilenet']} (real scene {EPOCHS['real']}, EfficientNet-B0 and MS-Transformer "
              f"{EPOCHS['MS-Transformer']})")
    common.show(args, {
        "Cost": costs(device),
        f"Frames; epochs of the APRs {epochs}, of PAE and refiner {EPOCHS['auxiliary']}": frames,
        "Refinement: medians, changes against the APR with 95 % intervals, recall": table})


if __name__ == "__main__":
    cli.run(main)
