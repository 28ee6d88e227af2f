"""From nothing to a trained, tested and refined model, on rooms that are rendered first: no download needed.

    python demo.py [--multiscene]

Runs the commands of the README one after the other and prints each as a user would type it. Ends with a table and the
names of pictures.
"""
import argparse
import os
import shlex
import shutil
import time

from datasets.official import SEVEN_SCENES
from engine.scripts import pae_script, run_script
from util import cli

POSENET = ["--preset", "7Scenes", "--set", "backbone_type=mobilenet"]
MS_TRANSFORMER = ["--set", "num_scenes=2", "hidden_dim=64", "nhead=4", "dim_feedforward=128", "num_t_encoder_layers=2",
                  "num_t_decoder_layers=1", "num_rot_encoder_layers=2", "num_rot_decoder_layers=1",
                  'reduction=["reduction_4", "reduction_4"]']
# Fewer epochs than published: a few minutes on two cores instead of hours.
TRAINING = {
    "posenet": ["n_epochs=10", "lr_scheduler_step_size=4", "n_workers=1"],
    "ems-transposenet": ["no_augment=true", "batch_size=16", "n_epochs=12", "lr_scheduler_step_size=4",
                         "lr_scheduler_gamma=0.5", "lr=1e-3", "s_x=-2", "s_q=-4", "n_workers=0"],
}
# Of the PAE.
AUXILIARY = ["batch_size=32", "n_epochs=100", "lr=1e-3", "lr_scheduler_step_size=30", "lr_scheduler_gamma=0.5"]


def main():
    """Run the demo that the command line asks for."""
    parser = argparse.ArgumentParser(description="Render rooms, train, test and refine on them, and show the errors.")
    parser.add_argument("--multiscene", action="store_true",
                        help="a small MS-Transformer on two rooms (default: PoseNet on one)")
    model, rooms = ("ems-transposenet", 2) if parser.parse_args().multiscene else ("posenet", 1)
    names = [f"room-{i + 1}" for i in range(rooms)]
    settings = POSENET if rooms == 1 else MS_TRANSFORMER
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    out = f"out/demo-{model}"
    data, labels = f"{out}/data", f"{out}/labels"
    if os.path.exists(out):
        print(f"removing {out}, of an earlier demo")
        shutil.rmtree(out)
    begin = time.monotonic()

    run("-m", "datasets.synthetic_scenes", data, "--scenes", *["room"] * rooms, "--frames", str(120 // rooms))
    run("-m", "datasets.prepare_7scenes", data, "--labels_path", labels)
    training_labels = f"{labels}/{SEVEN_SCENES.all_scenes_file}"
    test_labels = {name: f"{labels}/{SEVEN_SCENES.label_file(name, 'test')}" for name in names}

    def train(script, *arguments, more=()):
        lines = run(script, model, "train", "none", data, training_labels, "config.json", *arguments, "--output_dir",
                    out, *settings, *more)
        return lines[-1].removeprefix("Weights: "), lines[-2].removeprefix("Picture: ")

    def test(script, name, *weights, mode="test"):
        pictures = []
        for room in names:
            lines = run(script, model, mode, "none", data, test_labels[room], "config.json", *weights,
                        "--predictions_path", f"{out}/{name}_{room}.csv", "--output_dir", out, *settings)
            pictures.append(lines[-1].removeprefix("Pictures: "))
        return pictures

    # The first room's test walk shows how the training goes; the weights that are tested do not depend on it.
    apr, picture = train("main.py", "--val_labels_file", test_labels[names[0]], more=TRAINING[model])
    test("main.py", "apr", "--checkpoint_path", apr)
    pae, _ = train(pae_script(model), apr, more=AUXILIARY)
    test(pae_script(model), "pae", apr, "--encoder_checkpoint_path", pae)
    of_tests = test("main_refine_apr.py", "refined", apr, pae, "--ref_poses_file", training_labels, mode="optimize")

    show(out, training_labels, test_labels)
    pictures = [picture, *", ".join(of_tests).split(", ")]
    print("\nPictures of the APR's training and of the refined poses:", *pictures, sep="\n")
    print(f"{(time.monotonic() - begin) / 60:.1f} minutes in all")


def run(*command):
    """Run a script and show the command. Show and return its lines, without those of frames, batches and settings."""
    def show_line(line):
        if not line.startswith(hidden):
            print(line, end="", flush=True)

    hidden = ("Command:", "Running with", "\t", "[Batch-", "Epoch ")
    print(f"\n$ python {shlex.join(command)}", flush=True)
    return [line for line in run_script(*command, on_line=show_line) if not line.startswith(hidden)]


def show(out, training_labels, test_labels):
    """Print the table of median errors. test_labels: {scene: label file}."""
    import numpy as np
    import pandas as pd
    import torch

    from datasets.labels import poses_of, read_labels
    from models.refinement import pose_distances
    from util.metrics import changes, pose_err
    from util.rotations import mean_quaternion

    training = read_labels(training_labels)
    rows = {"training mean": [], "training pose nearest to it": [], "APR": [], "PAE": [], "refined": []}
    truths, novelty = [], []
    for scene, path in test_labels.items():
        truth = torch.tensor(poses_of(read_labels(path)))
        references = torch.tensor(poses_of(training[training["scene"] == scene]))
        mean = torch.cat((references[:, :3].mean(dim=0), mean_quaternion(references[:, 3:])))
        nearest = references[pose_distances(mean[None], references).argmin()]
        rows["training mean"].append(mean.expand(len(truth), 7))
        rows["training pose nearest to it"].append(nearest.expand(len(truth), 7))
        for name in ("APR", "PAE", "refined"):
            rows[name].append(torch.tensor(poses_of(read_labels(f"{out}/{name.lower()}_{scene}.csv"))))
        truths.append(truth)
        novelty.append(pd.read_csv(f"{out}/refined_{scene}.csv").get("novelty", pd.Series([np.nan] * len(truth))))
    errors = {name: [error.numpy() for error in pose_err(torch.cat(estimates), torch.cat(truths))]
              for name, estimates in rows.items()}
    trusted = np.argsort(np.concatenate(novelty), kind="stable")[:sum(map(len, novelty)) // 2]
    print("\nMedian errors; changes against the APR with 95 % intervals; and of the half with the smallest novelty\n\n"
          "| | position | change | orientation | change | trusted half |\n|---|---|---|---|---|---|")
    for name, of_name in errors.items():
        position, orientation, *of_trusted = (np.median(error[frames]) for frames in (slice(None), trusted)
                                              for error in of_name)
        of_change = [f"{change:+.0f} % ({low:+.0f} to {high:+.0f})" if name in ("PAE", "refined") else ""
                     for change, low, high in changes(errors["APR"], of_name)]
        print("| {} | {:.3f} m | {} | {:.3f} deg | {} | {:.3f} m, {:.3f} deg |".format(
            name, position, of_change[0], orientation, of_change[1], *of_trusted))


if __name__ == "__main__":
    cli.run(main)
