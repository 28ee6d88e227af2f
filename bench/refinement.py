"""How much refinement helps, and how well novelty tells wrong poses: APRs, PAEs and refiners trained by the scripts, on
rendered scenes and, where one is given, on a real one.

A part of every scene's training frames is held out, for validation of the PAE. It takes hours on two CPU cores.
--folder keeps what is finished, and the command continues from there.
"""
import os
import shutil
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from bench import common
from datasets.camera_poses import CameraPoseDataset
from datasets.labels import read_labels, write_labels
from datasets.official import SEVEN_SCENES
from datasets.references import read_references
from demo import AUXILIARY, MS_TRANSFORMER
from engine.evaluation import evaluate, milliseconds
from engine.report import scene_names_of
from engine.run import Run, device_of
from engine.scripts import pae_script, run_script
from models import build_pose_encoder, freeze, infer, load_apr
from models.checkpoints import fill, read_checkpoint
from models.iapr import IAPR
from models.pose_encoder import PoseEncoder
from models.pose_refiner import PoseRefiner
from models.refinement import nearest_references, optimize, queries_of
from util import cli
from util.config import Config, load_config
from util.metrics import ause, ause_of_chance, changes, pose_err
from util.rotations import mean_quaternion, unit_poses

FRAMES, EPOCHS = 120, {"mobilenet": 10, "real": 20, "efficientnet": 6, "MS-Transformer": 6, "auxiliary": 100,
                  "iAPR": 12}
POSENET = ["batch_size=32", "n_workers=1"]
RENDERED = {"mobilenet": [f"n_epochs={EPOCHS['mobilenet']}", "lr_scheduler_step_size=4"],
            "efficientnet": [f"n_epochs={EPOCHS['efficientnet']}", "lr_scheduler_step_size=3"]}
REAL = [f"n_epochs={EPOCHS['real']}"]
MULTI_SCENE = [*MS_TRANSFORMER[1:], "n_workers=1", "batch_size=16", f"n_epochs={EPOCHS['MS-Transformer']}", "lr=1e-3",
               "lr_scheduler_step_size=2", "lr_scheduler_gamma=0.5", "s_x=-2", "s_q=-4"]
IAPR_TRAINING = ["--method", "iapr", "--set", f"n_epochs={EPOCHS['iAPR']}", "lr=5e-4", "lr_scheduler_step_size=4"]
K = 3
N_QUERIES, N_REFERENCES = 1000, 7000  # of the costs
MEAN, LEAKED = f"mean of {K} references", "LEAKED: paper's optimisation, references from the test labels"
SOLVED = {"paper's optimisation (mlp)": "mlp", "its minimum (simplex)": "simplex", "kernel (default)": "kernel",
          "linear": "linear", "inversion": "inversion", LEAKED: "mlp"}
METHODS = ["APR", "PAE", "nearest reference", MEAN, *list(SOLVED)[:-1], "learned refiner", "iAPR", LEAKED]
WALK = 10  # the stretches of a real walk that its label files have in turns
STRANGERS = {"room-1": "room-2", "room-2": "room-1", "yard-1": "room-1", "excursion-1": "room-1", "real": "room-1",
             "real in time": "room-1"}
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
    """{scene: (dataset, training labels, validation labels, test labels)}, made unless they exist.

    Of rendered scenes, the last training walk is for validation. Of the real one, five stretches of its walk are; and
    `real in time` has its first half for training, the next quarter for validation, and the rest for testing.
    """
    found = {}
    for kind, names, seed in (("rooms", ("room-1", "room-2"), 0), ("yard", ("yard-1",), 0),
                              ("excursion", ("excursion-1",), 5)):
        dataset = f"{folder}/data/{kind}"
        if not os.path.exists(dataset):
            part = f"{dataset}.part"
            shutil.rmtree(part, ignore_errors=True)
            run_script("-m", "datasets.synthetic_scenes", part, "--scenes", *(name[:-2] for name in names), "--frames",
                       FRAMES, "--seed", seed)
            run_script("-m", "datasets.prepare_7scenes", part, "--labels_path", f"{part}/labels")
            os.rename(part, dataset)
        for name in names:
            train, test = (read_labels(f"{dataset}/labels/{SEVEN_SCENES.label_file(name, split)}")
                           for split in ("train", "test"))
            held_out = train["seq"] == train["seq"].iloc[-1]
            found[name] = dataset, *write(folder, name, train[~held_out], train[held_out], test)
    if real:
        dataset, train, test = real[0], *map(read_labels, real[1:])
        i, n = np.arange(len(train)), len(train)
        held_out = np.isin(i, [k * n // 5 + n // 28 + j for k in range(5) for j in range(-(-n // 32))])
        found["real"] = dataset, *write(folder, "real", train[~held_out], train[held_out], test)
        walk = pd.concat([table.iloc[part] for parts in zip(*(np.array_split(np.arange(len(table)), WALK)
                                                              for table in (train, test)))
                          for table, part in zip((train, test), parts)])
        half, most = len(walk) // 2, len(walk) - len(walk) * 13 // 50
        found["real in time"] = dataset, *write(folder, "real in time", walk[:half], walk[half:most], walk[most:])
    return found


def write(folder, scene, *tables):
    """Write label files of a scene's training, validation and test frames, and return their paths."""
    os.makedirs(f"{folder}/labels", exist_ok=True)
    paths = [f"{folder}/labels/{scene} {split}.csv" for split in ("train", "val", "test")]
    for path, table in zip(paths, tables):
        write_labels(path, table)
    return paths


def evaluated(folder, model, preset, settings, seed, dataset, training, validation, test, strangers, device):
    """Train what is missing for one APR, and evaluate a scene's test frames in every way.

    strangers: (dataset, labels) of another scene.

    Returns a dict: 'poses', {method: N x 7}; 'truth', N x 7; 'novelty', N; 'of strangers', the novelty of their frames;
    'expected', N x 4, as LatentMemory.expected_errors returns them.
    """
    os.makedirs(folder, exist_ok=True)

    def arguments(*weights):
        return [model, "train", "none", dataset, training, "config.json", *weights, "--seed", seed,
                "--device", device, *(["--preset", preset] if preset else []), "--set", *settings]

    apr_path = train(folder, "apr", "main.py", *arguments())
    pae_path = train(folder, "pae", pae_script(model), *arguments(apr_path), *AUXILIARY, "--val_labels_file",
                     validation)
    refiner_path = train(folder, "refiner", "main_refine_apr.py", *arguments(apr_path, pae_path), *AUXILIARY)

    config = load_config("config.json", model, ("pose_encoder", "refiner"), preset, settings)
    names = scene_names_of(model, config, apr_path)
    apr = load_apr(model, "none", config, apr_path).to(device)
    encoder = build_pose_encoder(model, config, pae_path).to(device)
    refiner = PoseRefiner(config["hidden_dim"]).to(device)
    fill(refiner_path, refiner, read_checkpoint(refiner_path, "refiner", config))
    freeze(apr, encoder, refiner)
    run = Run(Config({**config, "n_workers": 0}), device)
    frames = CameraPoseDataset(dataset, test, scene_names=names, origin=apr.origin)

    def queries_in(frames):
        results = evaluate(run, lambda batch: infer(apr, batch["img"]), frames)
        return queries_of({key: value.to(device) for key, value in results.items()})

    def references_of(path, leaked=False):
        num_scenes = None if model == "posenet" else config["num_scenes"]
        poses, scenes, _ = read_references(path, frames, names, num_scenes, leaked)
        return poses.to(device), scenes.to(device)

    queries, references = queries_in(frames), references_of(training)
    poses = {"APR": queries["pose"], "learned refiner": refiner(queries["latents"], queries["pose"]),
             "PAE": apr.regress(*encoder(queries["pose"], queries["scene"]))}
    nearest = references[0][nearest_references(queries["pose"], queries["scene"], *references, K)]
    poses["nearest reference"] = nearest[:, 0]
    poses[MEAN] = torch.cat((nearest[..., :3].mean(dim=1), mean_quaternion(nearest[..., 3:])), dim=1)
    for method, solver in SOLVED.items():
        given = references_of(test, leaked=True) if method == LEAKED else references
        poses[method], _ = optimize(solver, encoder, queries, *given, {**config, "num_neighbors": K}, seed)
    if model != "posenet":
        path = train(folder, "iapr", "main_refine_apr.py", *arguments(apr_path, pae_path), *IAPR_TRAINING)
        poses["iAPR"] = refined_by_iapr(run, apr, path, frames)
    novelty = encoder.memory.novelty(encoder, queries)
    of_strangers = encoder.memory.novelty(encoder, queries_in(CameraPoseDataset(*strangers)))
    return {"poses": {method: tensor.cpu() for method, tensor in poses.items()}, "truth": frames.poses,
            "novelty": novelty.cpu().numpy(), "of strangers": of_strangers.cpu().numpy(),
            "expected": encoder.memory.expected_errors(novelty).numpy()}


def refined_by_iapr(run, apr, path, frames):
    """Poses of frames, N x 7, that iAPR refines from those of an APR. path: iAPR's weights."""
    iapr = IAPR(run.config).to(run.device)
    fill(path, iapr, read_checkpoint(path, "iAPR", run.config))
    freeze(iapr)

    def refine(batch):
        first = infer(apr, batch["img"])
        return {"pose": iapr.refine(batch["img"], first["scene"], first["pose"], run.config["num_iterations"])}

    return evaluate(run, refine, frames)["pose"]


def rows_of(title, runs):
    """Rows of the table of methods. runs: per APR, and in it per scene, what `evaluated` returns."""
    rows = []
    errors = {method: errors_of(runs, method) for method in METHODS if method in runs[0][0]["poses"]}
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


def errors_of(runs, method):
    """Errors of a method's poses, 2 x APRs x frames: metres and degrees. runs: as for `rows_of`."""
    return np.stack([np.concatenate([np.stack(pose_err(scene["poses"][method], scene["truth"])) for scene in of_scenes],
                                    axis=1) for of_scenes in runs], axis=1)


def novelty_row(title, runs):
    """A row of the table of novelty, of all APRs' frames together, against the errors of the APR's own poses.

    By fifths: the frames in five groups of rising expected error, and in each the mean expected error over the mean
    true one. runs: as for `rows_of`.
    """
    scenes = [scene for of_scenes in runs for scene in of_scenes]
    novelty, strangers, expected = (np.concatenate([scene[key] for scene in scenes])
                                    for key in ("novelty", "of strangers", "expected"))
    errors = np.concatenate([np.stack(pose_err(scene["poses"]["APR"], scene["truth"])) for scene in scenes], axis=1)
    trusted = np.argsort(novelty, kind="stable")[:len(novelty) // 2]
    row = {"data": title}
    for name, error in zip(("position", "orientation"), errors):
        row[f"rank correlation with {name}"] = float(spearmanr(novelty, error)[0])
        row[f"AUSE of {name} (chance)"] = f"{ause(error, novelty):.2f} ({ause_of_chance(error):.2f})"
    row["trusted half m (oracle)"] = "{:.3f} ({:.3f})".format(
        np.median(errors[0][trusted]), np.median(np.sort(errors[0])[:len(trusted)]))
    row["AUROC of strangers"] = float(np.mean(strangers[:, None] > novelty))
    for name, error, predicted in zip(("position", "orientation"), errors, expected.T):
        fifths = np.array_split(np.argsort(predicted, kind="stable"), 5)
        ratios = (predicted[fifth].mean() / error[fifth].mean() for fifth in fifths)
        row[f"expected/true {name} by fifths"] = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return row


@torch.no_grad()
def costs(device):
    """Rows of a table: the time of each solver for all queries, encoding the references included."""
    torch.manual_seed(0)
    encoder = PoseEncoder(256, octaves=4).to(device)
    queries = {"pose": torch.randn(N_QUERIES, 7).to(device), "latents": torch.randn(N_QUERIES, 512).to(device),
               "scene": torch.zeros(N_QUERIES, dtype=torch.long, device=device)}
    references = unit_poses(torch.randn(N_REFERENCES, 7)).to(device)
    scenes = torch.zeros(N_REFERENCES, dtype=torch.long, device=device)
    encoder.fit_latents({"pose": references, "truth": references, "scene": scenes,
                         "latents": torch.randn(N_REFERENCES, 512).to(device)})
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

    def others(scene):
        dataset, *_, test = found[STRANGERS[scene]]
        return dataset, test

    def posenet(backbone, seed, scene):
        settings = [*POSENET, f"backbone_type={backbone}", *(REAL if "real" in scene else RENDERED[backbone])]
        return evaluated(f"{args.folder}/{scene}-{backbone}-{seed}", "posenet", "7Scenes", settings, seed,
                         *found[scene], others(scene), device)

    def ms_transformer(scene):
        dataset, *_, test = found[scene]
        tables = [pd.concat([read_labels(found[name][k]) for name in groups["rooms"]]) for k in (1, 2)]
        training, validation, _ = write(args.folder, "rooms", *tables)
        return evaluated(f"{args.folder}/rooms-ms-transformer-0", "ems-transposenet", None, MULTI_SCENE, 0, dataset,
                         training, validation, test, (found["yard-1"][0], found["yard-1"][-1]), device)

    groups = {"rooms": ["room-1", "room-2"], "yard": ["yard-1"], "excursion": ["excursion-1"],
              **({"real": ["real"], "real in time": ["real in time"]} if args.real else {})}
    table, of_novelty = [], []

    def add(title, runs):
        table.extend(rows_of(title, runs))
        of_novelty.append(novelty_row(title, runs))

    if "mobilenet" in args.only:
        for title, names in groups.items():
            add(f"{title}, MobileNetV2 x {args.seeds}",
                [[posenet("mobilenet", seed, name) for name in names] for seed in range(args.seeds)])
    if "efficientnet" in args.only:
        add("rooms, EfficientNet-B0", [[posenet("efficientnet", 0, name) for name in groups["rooms"]]])
    if "ms-transformer" in args.only:
        add("rooms, MS-Transformer", [[ms_transformer(name) for name in groups["rooms"]]])
    frames = [{"scene": scene, "training frames": len(read_labels(training)), "test frames": len(read_labels(test))}
              for scene, (_, training, _, test) in found.items()]
    epochs = (f"{EPOCHS['mobilenet']} (real scene {EPOCHS['real']}, EfficientNet-B0 and MS-Transformer "
              f"{EPOCHS['MS-Transformer']}), of iAPR {EPOCHS['iAPR']}")
    common.show(args, {
        "Cost": costs(device),
        f"Frames; epochs of the APRs {epochs}, of PAE and refiner {EPOCHS['auxiliary']}": frames,
        "Refinement: medians, changes against the APR with 95 % intervals, recall": table,
        "Novelty, and the errors expected from it": of_novelty})


if __name__ == "__main__":
    cli.run(main)
