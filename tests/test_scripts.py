"""The scripts as a user runs them, above all main.py on a single scene."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ROOT,
    fails_here,
    run_here,
    run_script,
    run_well,
    same_weights,
    weights_of,
    write_labels,
    write_scene,
)
from PIL import Image

from datasets.camera_poses import CameraPoseDataset
from datasets.transforms import to_input
from models.posenet import PoseNet

SCRIPTS = ("main.py", "main_learn_pose_encoding.py", "main_learn_multiscene_pose_encoding.py", "main_refine_apr.py")
POSE = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]

pytestmark = pytest.mark.usefixtures("small_frames")  # of runs within this process


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A scene of six training and three test frames."""
    root = tmp_path_factory.mktemp("layout")
    write_labels(root / "train.csv", write_scene(root, "attic", 6, "train"))
    write_labels(root / "test.csv", write_scene(root, "attic", 3, "test"))
    return root


def arguments(layout, mode, labels, out="out"):
    return ["posenet", mode, "none", layout, layout / labels, ROOT / "config.json", "--output_dir", layout / out,
            "--set", "backbone_type=mobilenet", "hidden_dim=32", "n_epochs=2", "batch_size=4", "n_freq_checkpoint=1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_and_names_every_option(script):
    process = run_script("-X", "importtime", script, "-h")
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    # Whatever takes long to load is not, on any machine.
    slow = {"torch", "numpy", "pandas", "scipy", "skimage", "matplotlib", "tqdm"}
    assert "argparse" in imported and not imported & slow
    output = process.stdout
    for word in ("MODEL", "BACKBONE", "DATASET", "LABELS", "CONFIG", "imagenet", "train or test", "--experiment",
                 "(default: out)", "--preset", "--set", "auto, cpu, cuda or cuda:N", "(default: 0)",
                 "--predictions_path"):
        assert word in output
    assert not re.search(r"^ +--\w+ [A-Z.=]+\n +--", output, flags=re.MULTILINE)  # an option without a description


@pytest.fixture(scope="module")
def trainings(layout):
    """What two trainings printed that ran at once, with two workers and with none, in processes of their own.

    What they imported is in imports.txt.
    """
    running = []
    with open(layout / "imports.txt", "w") as imports:
        for n_workers in (2, 0):
            listed = [*arguments(layout, "train", "train.csv", "at_once"), f"n_workers={n_workers}"]
            running.append(subprocess.Popen([sys.executable, "-X", "importtime", "main.py", *map(str, listed)],
                                            cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                            stderr=imports))
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    return outputs


def test_two_trainings_at_once_do_not_mix_their_files(layout, trainings):
    finals = [weights_of(output) for output in trainings]
    stamps = {final.name.removesuffix("_final.pth") for final in finals}
    assert len(stamps) == 2
    names = {path.name for path in (layout / "at_once").iterdir()}
    of_one = [f"_{name}.{kind}" for name in ("checkpoint-1", "checkpoint-2", "final") for kind in ("pth", "json")]
    assert names == {stamp + name for stamp in stamps for name in [*of_one, "_loss_fig.png", ".log"]}
    assert same_weights(*finals)


def test_a_training_imports_nothing_slow_that_it_does_not_need(layout, trainings):
    imported = {line.split("|")[-1].strip() for line in (layout / "imports.txt").read_text().splitlines()}
    assert {"torch.optim.adam", "torchvision.models", "matplotlib.figure"} <= imported
    assert not imported & {"torch._dynamo", "torch._inductor", "scipy.stats", "scipy.optimize", "skimage.io"}


def test_training_writes_what_the_published_code_writes(layout, trainings):
    output = trainings[0]
    weights = weights_of(output)
    about = json.loads(weights.with_suffix(".json").read_text())
    stem = re.fullmatch(r"(run_\d\d_\d\d_\d\d_\d\d_\d\d(?:_\d+)?)_final\.pth", weights.name)[1]
    # Without the files of the other training, whose stamp may begin with this one's.
    written = {path.name for path in weights.parent.iterdir() if re.fullmatch(rf"{stem}(\.|_[a-z]).*", path.name)}
    assert written == {f"{stem}.log", f"{stem}_loss_fig.png", *(
        f"{stem}_{name}.{kind}" for name in ("checkpoint-1", "checkpoint-2", "final") for kind in ("pth", "json"))}
    assert f"\nPicture: {weights.parent / stem}_loss_fig.png\n" in output
    Image.open(weights.parent / f"{stem}_loss_fig.png").load()
    assert re.search(r"^\[Batch-1/Epoch-2\] running camera pose loss: -?\d+\.\d{3}, camera pose error: "
                     r"\d+\.\d\d\[m\], \d+\.\d\d\[deg\]$", output, flags=re.MULTILINE)
    # The poses are random, and may look suspicious.
    assert "\nLabels: 6 frames, nothing suspicious\n" in output or "\nLabels: 6 frames, change of" in output
    log = (weights.parent / f"{stem}.log").read_text()
    assert all(line in log for line in output.splitlines())
    assert about["model"] == "posenet" and about["scene_names"] == ["attic"] and about["seed"] == 0
    assert about["config"]["n_epochs"] == 2 and about["labels_file"] == str(layout / "train.csv")
    assert not list(weights.parent.glob("*.part"))


def test_a_seed_makes_a_training_repeatable_with_any_number_of_workers(layout):
    listed = arguments(layout, "train", "train.csv")
    with_workers, without, of_seed_1 = (weights_of(run_here("main.py", *listed, *more)) for more in (
        ["n_workers=2"], ["n_workers=0"], ["n_workers=0", "--seed", "1"]))
    assert same_weights(with_workers, without)
    assert not torch.equal(torch.load(without)["x_reg.weight"], torch.load(of_seed_1)["x_reg.weight"])


def test_a_test_logs_and_writes_poses_and_errors(layout, trainings):
    predictions = layout / "predictions.csv"
    output = run_well("main.py", *arguments(layout, "eval", "test.csv"), "--checkpoint_path", weights_of(trainings[0]),
                      "--predictions_path", predictions, "--experiment", "a note", "--name", "first", "--verbose")
    assert "Experiment details: a note" in output
    [log] = (layout / "out" / "first").glob("run_*.log")
    table, labels = pd.read_csv(predictions), pd.read_csv(layout / "test.csv")
    assert list(table) == [*labels, "position_error_m", "orientation_error_deg"]
    assert (table["img_path"] == labels["img_path"]).all()
    pose, truth = (t[POSE].to_numpy() for t in (table, labels))
    assert (pose[:, 3:] ** 2).sum(axis=1) == pytest.approx(1)
    distance = ((pose[:, :3] - truth[:, :3]) ** 2).sum(axis=1) ** 0.5
    assert table["position_error_m"].to_numpy() == pytest.approx(distance, abs=1e-5)
    medians = "{:.3f}[m], {:.3f}[deg]".format(*table[["position_error_m", "orientation_error_deg"]].median())
    lines = output.splitlines()
    of_frame = r"Pose error: [\d.]+\[m\], [\d.]+\[deg\], inferred in [\d.]+\[ms\]"
    assert sum(re.fullmatch(of_frame, line) is not None for line in lines) == 3
    assert len(re.findall(of_frame, log.read_text())) == 3
    at = lines.index(f"Median pose error: {medians}")
    assert re.fullmatch(r"Mean inference time:\d+\.\d\d\[ms\]", lines[at + 1])
    assert lines[at + 2].startswith("Mean pose error: ") and lines[at + 3].startswith("90th percentile: ")
    assert [line.split(":")[0] for line in lines[at + 4:at + 9]] == [
        f"Recall at {limits}" for limits in ("0.05 m/5 deg", "0.1 m/1 deg", "0.25 m/2 deg", "0.5 m/5 deg",
                                             "5 m/10 deg")]
    pictures = lines[-1].removeprefix("Pictures: ").split(", ")
    assert [path.rsplit("_", 1)[1] for path in pictures] == ["positions.png", "errors.png", "sequences.png",
                                                             "worst.png"]
    for path in pictures:
        Image.open(path).load()


def test_predict_gives_the_poses_that_a_test_gives(layout, trainings):
    checkpoint = ["--checkpoint_path", weights_of(trainings[0])]
    run_here("main.py", *arguments(layout, "test", "test.csv"), *checkpoint,
             "--predictions_path", layout / "tested.csv")
    tested = pd.read_csv(layout / "tested.csv")
    of_split = {split: [f"frame-{i:06d}.color.png" for i in range(n)] for split, n in (("test", 3), ("train", 6))}
    for images, names in ((layout / "attic" / "seq-test", of_split["test"]),
                          (layout / "attic", [f"seq-{split}/{name}" for split in of_split for name in of_split[split]]),
                          (layout / "att*" / "seq-test" / "*[1-9].color.png", of_split["test"][1:])):
        listed = arguments(layout, "predict", "-")
        listed[3:5] = [images, "-"]
        output = run_here("main.py", *listed, *checkpoint, "--predictions_path", layout / "predicted.csv")
        table = pd.read_csv(layout / "predicted.csv")
        assert list(table) == ["img_path", *POSE] and table["img_path"].tolist() == names
        assert f"Predictions: {len(names)} poses of {len(names)} images in {layout / 'predicted.csv'}" in output
        of_test = tested[tested["img_path"].str.split("/").str[-1].isin(name.split("/")[-1] for name in names)]
        assert np.allclose(table[POSE].iloc[:len(of_test)], of_test[POSE], atol=1e-5)


def test_published_config_files_load_as_they_are(layout):
    config = {"general": {"n_freq_print": 5, "n_freq_checkpoint": 2, "n_workers": 0, "device_id": "cuda:0",
                          "n_epochs": 1},
              "posenet": {"learnable": True, "s_x": 0.0, "s_q": -3.0, "norm": 2, "lr": 1e-4, "batch_size": 8,
                          "lr_scheduler_gamma": 0.1, "lr_scheduler_step_size": 10, "weight_decay": 1e-4, "eps": 1e-10,
                          "n_epochs": 30, "hidden_dim": 16, "backbone_type": "mobilenet", "nheads": 4,
                          "latent_dim": 1024}}
    (layout / "published.json").write_text(json.dumps(config))
    output = run_here("main.py", "posenet", "train", "none", layout, layout / "train.csv", layout / "published.json",
                      "--output_dir", layout / "published")
    assert "Epoch-1]" in output and "Epoch-2]" not in output  # general wins over the section in published files
    assert output.count("nheads is ignored") == 1 and "nothing reads: latent_dim" in output
    assert "No cuda:0 here: running on cpu" in output or torch.cuda.is_available()


def test_no_augment_trains_on_the_test_transform(layout, monkeypatch):
    batches, forward = [], PoseNet.forward
    monkeypatch.setattr(PoseNet, "forward", lambda self, data: batches.append(data["img"]) or forward(self, data))

    def images_of_training(*settings):
        batches.clear()
        run_here("main.py", *arguments(layout, "train", "train.csv"), "n_workers=0", "n_epochs=1", *settings)
        return torch.cat(batches)

    dataset = CameraPoseDataset(layout, layout / "train.csv")
    centres = to_input(torch.stack([dataset[i]["img"] for i in range(6)]))
    images = images_of_training("no_augment=true")
    assert all(any(torch.equal(image, centre) for image in images) for centre in centres)
    images = images_of_training()
    assert not any(any(torch.equal(image, centre) for image in images) for centre in centres)


def test_the_convention_of_the_labels_is_kept_with_the_weights(layout):
    shutil.copy(layout / "train.csv", layout / "known.csv")
    (layout / "known.json").write_text('{"unit": "m", "convention": "colmap"}')
    (layout / "chess.csv").write_text((layout / "train.csv").read_text().replace("attic,", "chess,"))
    for labels, convention in (("known.csv", "colmap"), ("chess.csv", "7Scenes"), ("train.csv", None)):
        output = run_here("main.py", *arguments(layout, "train", labels), "n_epochs=1", "n_workers=0")
        assert json.loads(weights_of(output).with_suffix(".json").read_text()).get("convention") == convention


def test_a_label_files_unit_is_that_of_the_log_and_the_weights(layout, trainings):
    shutil.copy(layout / "test.csv", layout / "unscaled.csv")
    (layout / "unscaled.json").write_text('{"unit": "model units"}')
    weights = weights_of(trainings[0])
    output = run_here("main.py", *arguments(layout, "test", "unscaled.csv"), "--checkpoint_path", weights)
    assert re.search(r"^Median pose error: [\d.]+\[model units\], [\d.]+\[deg\]$", output, flags=re.MULTILINE)
    assert "[m]" not in output
    assert re.search(r"final.pth was trained on positions in m, but those of .*unscaled.csv are in model units", output)
    assert json.loads(weights.with_suffix(".json").read_text())["unit"] == "m"
    output = run_here("main.py", *arguments(layout, "test", "test.csv"), "--checkpoint_path", weights)
    assert "[m]" in output and "model units" not in output


def test_a_root_one_folder_too_deep_or_too_high_is_told_as_such(layout, trainings, tmp_path):
    weights, data = weights_of(trainings[0]), tmp_path / "data"
    shutil.copytree(layout / "attic", data / "attic")
    for root, advice in ((data / "attic", f"the folder above: give {data}"),
                         (tmp_path, f"the folder in it: give {data}")):
        listed = arguments(layout, "test", "test.csv")
        listed[3] = root
        status, line = fails_here("main.py", *listed, "--checkpoint_path", weights)
        assert status == 2 and "does not exist" in line and line.endswith(advice)
