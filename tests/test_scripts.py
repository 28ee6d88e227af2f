"""The scripts as a user runs them, on small generated layouts."""
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, fails_here, run_here, run_script, run_well, weights_of, write_labels, write_scene
from PIL import Image

from datasets.camera_poses import CameraPoseDataset, to_input

SCRIPTS = ("main.py", "main_learn_pose_encoding.py", "main_learn_multiscene_pose_encoding.py", "main_refine_apr.py")
SMALL_TRANSFORMER = [f"num_{branch}_{part}_layers=1" for branch in ("t", "rot") for part in ("encoder", "decoder")]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """Two scenes of six frames, and label files of both and of each alone."""
    root = tmp_path_factory.mktemp("layout")
    rows = {scene: write_scene(root, scene, 6, "train") for scene in ("attic", "cellar")}
    write_labels(root / "both.csv", rows["attic"] + rows["cellar"])
    for scene in rows:
        write_labels(root / f"{scene}.csv", rows[scene])
        write_labels(root / f"{scene}_test.csv", write_scene(root, scene, 3, "test"))
    return root


def trained(output):
    weights = weights_of(output)
    about = json.loads(weights.with_suffix(".json").read_text())
    return weights, about


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once_and_tells_all(script):
    process = run_script("-X", "importtime", script, "-h")
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    # Whatever takes long to load is not, on any machine.
    assert "argparse" in imported and not imported & {"torch", "numpy", "pandas", "scipy", "skimage", "matplotlib", "tqdm"}
    output = process.stdout
    for word in ("MODEL", "BACKBONE", "DATASET", "LABELS", "CONFIG", "imagenet", "train or test", "--experiment",
                 "(default: out)", "--preset", "--set", "auto, cpu, cuda or cuda:N", "(default: 0)", "--predictions_path"):
        assert word in output
    assert not re.search(r"^ +--\w+ [A-Z.=]+\n +--", output, flags=re.MULTILINE)  # an option without a word about it


@pytest.fixture(scope="module")
def posenet(layout, tmp_path_factory):
    """The arguments of a posenet run and a training of it, two epochs, with two workers."""
    def arguments(mode, labels, out="out"):
        return ["posenet", mode, "none", layout, layout / labels, ROOT / "config.json", "--output_dir", layout / out,
                "--set", "backbone_type=mobilenet", "hidden_dim=32", "n_epochs=2", "batch_size=4", "n_freq_checkpoint=1",
                "n_workers=2"]
    output = run_well("main.py", *arguments("train", "attic.csv"))
    return arguments, output


def test_the_final_weights_are_the_mean_over_the_last_part(posenet, layout):
    arguments, _ = posenet
    listed = arguments("train", "attic.csv", "averaged")
    # Batches of all six frames: an epoch is a step, and its checkpoint the weights after that step.
    listed += ["n_workers=0", "batch_size=6", "n_epochs=4", "no_augment=true", "precision=fp32"]
    final = weights_of(run_here("main.py", *listed, "average_last=0.5"))
    steps = [torch.load(str(final).replace("final", f"checkpoint-{epoch}")) for epoch in (3, 4)]
    weights = torch.load(final)
    for key, value in weights.items():
        if value.is_floating_point() and "running" not in key:
            assert torch.allclose(value, (steps[0][key] + steps[1][key]) / 2, atol=1e-6), key
    # Batch norm's statistics are those of the frames under the mean weights, here of the first convolution's output.
    images = to_input(torch.stack([item["img"] for item in CameraPoseDataset(layout, layout / "attic.csv")]))
    maps = F.conv2d(images, weights["backbone.0.0.0.weight"], stride=2, padding=1)
    assert torch.allclose(weights["backbone.0.0.1.running_mean"], maps.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(weights["backbone.0.0.1.running_var"], maps.var(dim=(0, 2, 3)), rtol=1e-3)
    last = weights_of(run_here("main.py", *listed, "average_last=0"))
    assert all(torch.equal(value, steps[1][key]) for key, value in torch.load(last).items())


def test_training_writes_what_the_published_code_writes(posenet, layout):
    arguments, output = posenet
    weights, about = trained(output)
    stem = re.fullmatch(r"(run_\d\d_\d\d_\d\d_\d\d_\d\d(?:_\d+)?)_final\.pth", weights.name)[1]
    written = {path.name for path in weights.parent.glob(f"{stem}*")}
    assert written == {f"{stem}.log", f"{stem}_loss_fig.png", *(
        f"{stem}_{name}.{kind}" for name in ("checkpoint-1", "checkpoint-2", "final") for kind in ("pth", "json"))}
    assert f"\nPicture: {weights.parent / stem}_loss_fig.png\n" in output
    Image.open(weights.parent / f"{stem}_loss_fig.png").load()
    assert re.search(r"^\[Batch-1/Epoch-2\] running camera pose loss: -?\d+\.\d{3}, camera pose error: \d+\.\d\d\[m\], "
                     r"\d+\.\d\d\[deg\]$", output, flags=re.MULTILINE)
    assert "\nLabels: 6 frames, nothing suspicious\n" in output or "\nLabels: 6 frames, change of" in output  # random poses
    log = (weights.parent / f"{stem}.log").read_text()
    assert all(line in log for line in output.splitlines())
    assert about["model"] == "posenet" and about["scene_names"] == ["attic"] and about["seed"] == 0
    assert about["config"]["n_epochs"] == 2 and about["labels_file"] == str(layout / "attic.csv")
    assert not list(weights.parent.glob("*.part"))


def test_a_seed_makes_a_training_repeatable_with_any_number_of_workers(posenet):
    arguments, output = posenet
    first = torch.load(weights_of(output))
    again, other = (torch.load(weights_of(run_here("main.py", *arguments("train", "attic.csv"), "n_workers=0", *seed)))
                    for seed in ([], ["--seed", "1"]))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["x_reg.weight"], other["x_reg.weight"])


def test_a_test_logs_and_writes_what_it_found(posenet, layout):
    arguments, output = posenet
    predictions = layout / "predictions.csv"
    output = run_well("main.py", *arguments("eval", "attic_test.csv"), "--checkpoint_path", weights_of(output),
                      "--predictions_path", predictions, "--experiment", "a note")
    assert "Experiment details: a note" in output
    table, labels = pd.read_csv(predictions), pd.read_csv(layout / "attic_test.csv")
    assert list(table) == [*labels, "position_error_m", "orientation_error_deg"]
    assert (table["img_path"] == labels["img_path"]).all()
    pose, truth = (t[["t1", "t2", "t3", "q1", "q2", "q3", "q4"]].to_numpy() for t in (table, labels))
    assert (pose[:, 3:] ** 2).sum(axis=1) == pytest.approx(1)
    distance = ((pose[:, :3] - truth[:, :3]) ** 2).sum(axis=1) ** 0.5
    assert table["position_error_m"].to_numpy() == pytest.approx(distance, abs=1e-5)
    medians = "{:.3f}[m], {:.3f}[deg]".format(table["position_error_m"].median(), table["orientation_error_deg"].median())
    lines = output.splitlines()
    frames = [line for line in lines if re.fullmatch(r"Pose error: [\d.]+\[m\], [\d.]+\[deg\], inferred in [\d.]+\[ms\]", line)]
    assert len(frames) == 3
    at = lines.index(f"Median pose error: {medians}")
    assert re.fullmatch(r"Mean inference time:\d+\.\d\d\[ms\]", lines[at + 1])
    assert lines[at + 2].startswith("Mean pose error: ") and lines[at + 3].startswith("90th percentile: ")
    assert [line.split(":")[0] for line in lines[at + 4:at + 8]] == [
        f"Recall at {limits}" for limits in ("0.1 m/1 deg", "0.25 m/2 deg", "0.5 m/5 deg", "5 m/10 deg")]
    pictures = lines[-1].removeprefix("Pictures: ").split(", ")
    assert [path.rsplit("_", 1)[1] for path in pictures] == ["positions.png", "errors.png", "sequences.png", "worst.png"]
    for path in pictures:
        Image.open(path).load()


def test_predict_gives_the_poses_that_a_test_gives(posenet, layout):
    arguments, output = posenet
    checkpoint = ["--checkpoint_path", weights_of(output)]
    run_here("main.py", *arguments("test", "attic_test.csv"), *checkpoint, "--predictions_path", layout / "tested.csv")
    tested = pd.read_csv(layout / "tested.csv")
    poses = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]
    for images, names in ((layout / "attic" / "seq-test", [f"frame-{i:06d}.color.png" for i in range(3)]),
                          (layout / "attic", [f"seq-{split}/frame-{i:06d}.color.png" for split, n in (("test", 3), ("train", 6)) for i in range(n)]),
                          (layout / "att*" / "seq-test" / "*[1-9].color.png", [f"frame-{i:06d}.color.png" for i in (1, 2)])):
        listed = arguments("predict", "-")
        listed[3:5] = [images, "-"]
        output = run_here("main.py", *listed, *checkpoint, "--predictions_path", layout / "predicted.csv")
        table = pd.read_csv(layout / "predicted.csv")
        assert list(table) == ["img_path", *poses] and table["img_path"].tolist() == names
        assert f"Predictions: {len(names)} poses in {layout / 'predicted.csv'}" in output
        of_test = tested[tested["img_path"].str.split("/").str[-1].isin(name.split("/")[-1] for name in names)]
        assert np.allclose(table[poses].iloc[:len(of_test)], of_test[poses], atol=1e-5)


def test_published_config_files_load_as_they_are(posenet, layout):
    config = {"general": {"n_freq_print": 5, "n_freq_checkpoint": 2, "n_workers": 0, "device_id": "cuda:0", "n_epochs": 1},
              "posenet": {"learnable": True, "s_x": 0.0, "s_q": -3.0, "norm": 2, "lr": 1e-4, "batch_size": 8,
                          "lr_scheduler_gamma": 0.1, "lr_scheduler_step_size": 10, "weight_decay": 1e-4, "eps": 1e-10,
                          "n_epochs": 30, "hidden_dim": 16, "backbone_type": "mobilenet", "nheads": 4, "latent_dim": 1024}}
    (layout / "published.json").write_text(json.dumps(config))
    output = run_here("main.py", "posenet", "train", "none", layout, layout / "attic.csv", layout / "published.json",
                      "--output_dir", layout / "published")
    assert "Epoch-1]" in output and "Epoch-2]" not in output  # general wins over the section in published files
    assert output.count("nheads is ignored") == 1 and "nothing reads: latent_dim" in output
    assert "No cuda:0 here: running on cpu" in output or torch.cuda.is_available()


def test_two_runs_at_once_keep_apart(posenet, layout):
    arguments, output = posenet
    command = [sys.executable, "main.py", *map(str, arguments("train", "attic.csv", "twice")), "n_workers=0"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    finals = [weights_of(process.communicate()[0]) for process in processes]
    stamps = {final.name.removesuffix("_final.pth") for final in finals}
    assert len(stamps) == 2
    names = {path.name for path in (layout / "twice").iterdir()}
    of_one = [f"_checkpoint-{epoch}.{kind}" for epoch in (1, 2) for kind in ("pth", "json")] + ["_final.pth", "_final.json", "_loss_fig.png", ".log"]
    assert names == {stamp + name for stamp in stamps for name in of_one}
    first, *others = (torch.load(path) for path in (weights_of(output), *finals))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_multi_scene_models_train_and_test_on_two_scenes(layout):
    def arguments(model, mode, labels, *more):
        return [model, mode, "none", layout, layout / labels, ROOT / "config.json", *more, "--output_dir", layout / "ms",
                "--set", "num_scenes=2", "n_epochs=1", "n_workers=0", "batch_size=6", *SMALL_TRANSFORMER]

    apr, about = trained(run_here("main.py", *arguments("ems-transposenet", "train", "both.csv"), "equalize_scenes=true",
                                  "n_epochs=2"))
    assert about["scene_names"] == ["attic", "cellar"]

    def scenes_of(script, labels, *more, out):
        output = run_here(script, *arguments("ems-transposenet", "test", labels, *more), "--predictions_path", layout / out)
        return output, pd.read_csv(layout / out)

    # One scene alone is still scene 1 of the model; the names come from the JSON beside the weights.
    _, both = scenes_of("main.py", "both.csv", "--checkpoint_path", apr, out="both_predicted.csv")
    output, alone = scenes_of("main.py", "cellar.csv", "--checkpoint_path", apr, out="alone_predicted.csv")
    assert alone["predicted_scene"].tolist() == both["predicted_scene"].tolist()[6:]
    accuracy = 100 * (alone["predicted_scene"] == "cellar").mean()
    assert f"Scene accuracy: {accuracy:.1f}%" in output
    assert "Scene cellar (index 1): 6 frames, median " in output

    listed = arguments("ems-transposenet", "predict", "-", "--checkpoint_path", apr, "--predictions_path", layout / "predicted.csv")
    listed[3:5] = [layout / "cellar" / "seq-train", "-"]
    output = run_here("main.py", *listed)
    table = pd.read_csv(layout / "predicted.csv")
    assert table["predicted_scene"].tolist() == alone["predicted_scene"].tolist() and "Scenes: " in output
    assert table["scene_probability"].between(0.5, 1).all()  # the likelier of two
    assert np.allclose(table.loc[:, "t1":"q4"], alone.loc[:, "t1":"q4"], atol=1e-5)

    # Names of a preset give way to those of the JSON, and --set's are taken instead; a line says so.
    config = json.loads((ROOT / "config.json").read_text())
    config["presets"]["other"] = {"scene_names": ["cellar", "attic"], "ems-transposenet": {}}
    (layout / "preset.json").write_text(json.dumps(config))
    for given, of_cellar, said in (
            ([], 1, f"Scenes: attic, cellar, as the JSON beside {apr} says; not cellar, attic, as the preset or the config\n"),
            (['scene_names=["cellar", "attic"]'], 0, f"Scenes: cellar, attic, as --set says; not attic, cellar, as the JSON beside {apr}\n")):
        listed = [layout / "preset.json" if part == ROOT / "config.json" else part for part in arguments(
            "ems-transposenet", "test", "cellar.csv", "--checkpoint_path", apr, "--preset", "other")]
        output = run_here("main.py", *listed, *given)
        assert output.count(said) == 1 and f"Scene cellar (index {of_cellar}): " in output
        accuracy = 100 * (alone["predicted_scene"] == ("cellar" if of_cellar else "attic")).mean()
        assert f"Scene accuracy: {accuracy:.1f}%" in output

    pae, about = trained(run_here("main_learn_multiscene_pose_encoding.py",
                                  *arguments("ems-transposenet", "train", "both.csv", apr)))
    assert pae.name.endswith("_pose_encoder_final.pth") and about["scene_names"] == ["attic", "cellar"]
    output, table = scenes_of("main_learn_multiscene_pose_encoding.py", "cellar.csv", apr, "--encoder_checkpoint_path", pae,
                              out="pae_predicted.csv")
    assert table["predicted_scene"].tolist() == alone["predicted_scene"].tolist()
    assert "The APR's own median: " in output and "Scene cellar (index 1): 6 frames" in output

    refiner = weights_of(run_here("main_refine_apr.py", *arguments("ems-transposenet", "train", "both.csv", apr, pae)))
    assert refiner.name.endswith("_rpr_final.pth")
    output, table = scenes_of("main_refine_apr.py", "cellar_test.csv", apr, pae, "--rpr_checkpoint_path", refiner,
                              out="refined.csv")
    assert "The APR's own median: " in output and len(table) == 3
    # References of the other scene alone: frames predicted in this one keep the APR's pose.
    references = "attic.csv" if table["predicted_scene"].iloc[0] == "cellar" else "cellar.csv"
    listed = [layout / "scene_of_both.csv" if part == layout / "cellar_test.csv" else part for part in arguments(
        "ems-transposenet", "optimize", "cellar_test.csv", apr, pae)]
    tested = (layout / "cellar_test.csv").read_text()
    (layout / "scene_of_both.csv").write_text(tested + tested.splitlines()[1].replace("cellar,", "attic,", 1) + "\n")
    for solver in ("linear", "inversion", "mlp", "simplex"):
        output = run_here("main_refine_apr.py", *listed, "scene_names=[\"attic\", \"cellar\"]", "--solver", solver,
                          "--ref_poses_file", layout / references, "--predictions_path", layout / "unrefined.csv")
        table = pd.read_csv(layout / "unrefined.csv")
        kept = np.isclose(table[[f"apr_t{i}" for i in (1, 2, 3)]], table[["t1", "t2", "t3"]], atol=1e-6).all(axis=1)
        # Six references are too few for the first two solvers.
        without = (table["predicted_scene"] != references[:-4]) | (solver in ("linear", "inversion"))
        assert (kept == without).all() and f"{kept.sum()} frames keep the APR's pose" in output
        assert output.count("Median pose error") == 1 and "Change of the median position error: " in output
    apr_table = scenes_of("main.py", "cellar_test.csv", "--checkpoint_path", apr, out="apr.csv")[1]
    assert "frames keep the APR's pose" in output
    assert table.loc[0, "t1":"q4"].tolist() == pytest.approx(apr_table.loc[0, "t1":"q4"].tolist(), abs=1e-5)

    # ms-transposenet, and fine-tuning with all but a part frozen, from a checkpoint.
    ms = weights_of(run_here("main.py", *arguments("ms-transposenet", "train", "both.csv")))
    tuned = weights_of(run_here("main.py", *arguments("ms-transposenet", "train", "both.csv", "--checkpoint_path", ms),
                                "freeze=true", 'freeze_exclude_phrase=["regressor_head_t", "transformer_t"]', "learnable=false",
                                "s_x=1", "s_q=0"))
    before, after = torch.load(ms), torch.load(tuned)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("regressor_head_t.") for key in changed)


def test_a_pae_and_a_refiner_train(posenet, layout):
    arguments, output = posenet
    apr = weights_of(output)

    def train(script, *more):
        listed = arguments("train", "attic.csv")
        output = run_here(script, *listed[:6], apr, *more, *listed[6:], "n_epochs=400", "n_freq_checkpoint=1000", "n_workers=0",
                          "learnable=false", "s_x=1", "s_q=1")
        losses = [float(loss) for loss in re.findall(r"running camera pose loss: (-?[\d.]+)", output)]
        assert losses[-1] < 0.7 * losses[0]
        return weights_of(output)

    pae = train("main_learn_pose_encoding.py")
    assert torch.load(pae)._metadata[""]["version"] == 3
    refiner = train("main_refine_apr.py", pae)
    # Both know their APR: with another, also one of the same training, they are refused.
    other, listed = str(apr).replace("final", "checkpoint-1"), arguments("test", "attic_test.csv")
    for script, mode, weights, more in (
            ("main_learn_pose_encoding.py", "test", [], ["--encoder_checkpoint_path", pae]),
            ("main_refine_apr.py", "test", [pae], ["--rpr_checkpoint_path", refiner]),
            ("main_refine_apr.py", "optimize", [pae], ["--ref_poses_file", layout / "attic.csv"])):
        status, said = fails_here(script, "posenet", mode, *listed[2:6], other, *weights, *listed[6:8], *more, *listed[8:])
        assert status == 2 and said.endswith(f"{refiner if mode == 'test' and weights else pae}: was trained on the latents of another APR "
                                             f"than {other}; give that APR, or train anew on this one")
    listed = arguments("test", "attic_test.csv")
    output = run_here("main_refine_apr.py", *listed[:6], apr, pae, *listed[6:], "--rpr_checkpoint_path", refiner)
    assert re.search(r"^The APR's own median: .*\n(Change of the median .*\(too few frames for an interval\)\n){2}Median pose error: ",
                     output, flags=re.MULTILINE)

    # The paper's optimisation weighs the poses of three references, whatever else there is; the answers must be asked for.
    listed = arguments("optimize", "attic_test.csv")
    listed = [*listed[:6], apr, pae, *listed[6:], "--predictions_path", layout / "optimized.csv", "--solver"]
    output = run_here("main_refine_apr.py", *listed, "mlp", "--ref_poses_file", layout / "attic.csv")
    positions = pd.read_csv(layout / "attic.csv")[["t1", "t2", "t3"]].to_numpy()
    table = pd.read_csv(layout / "optimized.csv")
    for position in table[["t1", "t2", "t3"]].to_numpy():
        assert any(inside(position, positions[list(three)]) for three in itertools.combinations(range(6), 3))
    assert np.allclose(table[[f"apr_q{i}" for i in range(1, 5)]], table[[f"q{i}" for i in range(1, 5)]], atol=1e-6)
    assert "held the answers" not in output and re.search(r"^Refinement: \d+\.\d+ ms a query, \d+\.\d% of the APR's time$",
                                                          output, flags=re.MULTILINE)
    # A PAE without the covariance of latents, as published ones are, can do no more; that is then the default.
    weights = torch.load(pae)
    torch.save({**weights, "noise": torch.zeros_like(weights["noise"])}, layout / "published_pae.pth")
    of_published = [layout / "published_pae.pth" if part == pae else part for part in listed[:-1]]
    output = run_here("main_refine_apr.py", *of_published, "--ref_poses_file", layout / "attic.csv")
    assert f"refined by {layout / 'published_pae.pth'} (mlp) on " in output
    status, said = fails_here("main_refine_apr.py", *of_published, "--solver", "inversion", "--ref_poses_file", layout / "attic.csv")
    assert status == 2 and "does not hold the covariance of latents that inversion works with" in said and "choose --solver mlp or simplex" in said
    leaked = run_here("main_refine_apr.py", *listed, "simplex", "--ref_poses_file", layout / "attic_test.csv", "--allow_query_poses")
    results = [line for line in leaked.splitlines() if line.startswith(("Median", "Mean pose", "90th", "Recall", "Change"))]
    assert len(results) == 9 and all(line.endswith(" (the references held the answers)") for line in results)


def inside(point, corners):
    """Whether a point is in a triangle."""
    (a, b), *_ = np.linalg.lstsq((corners[1:] - corners[0]).T, point - corners[0])
    return np.allclose(corners[0] + a * (corners[1] - corners[0]) + b * (corners[2] - corners[0]), point, atol=1e-4) and (
        min(a, b, 1 - a - b) > -1e-4)


@pytest.fixture
def images_seen(monkeypatch):
    """Run a script in this process; returns the batches of images that PoseNet was given."""
    from models.posenet import PoseNet
    seen = []
    forward = PoseNet.forward
    monkeypatch.setattr(PoseNet, "forward", lambda self, data: seen.append(data["img"]) or forward(self, data))

    def run(*command):
        seen.clear()
        return run_here(*command), torch.cat(seen)
    return run


def test_the_teacher_runs_once_over_the_frames_whatever_the_paes_input(posenet, layout, images_seen):
    arguments, output = posenet
    listed, apr = arguments("train", "attic.csv"), weights_of(output)
    paes = {}
    for pae_input in ("estimated", "true"):
        output, seen = images_seen("main_learn_pose_encoding.py", *listed[:6], apr, *listed[6:], "n_epochs=5",
                                   "n_workers=0", f"pae_input={pae_input}")
        assert len(seen) == 6
        paes[pae_input] = torch.load(weights_of(output))
    # At the start both are the same network; what they were given to encode is not.
    assert not torch.equal(paes["estimated"]["x_encoder.0.weight"], paes["true"]["x_encoder.0.weight"])


def test_no_augment_trains_on_the_test_transform(posenet, layout, images_seen):
    arguments, _ = posenet
    _, seen = images_seen("main.py", *arguments("train", "attic.csv"), "n_workers=0", "no_augment=true", "n_epochs=1")
    dataset = CameraPoseDataset(layout, layout / "attic.csv")
    centres = to_input(torch.stack([dataset[i]["img"] for i in range(6)]))
    assert all(any(torch.equal(image, centre) for image in seen) for centre in centres)
    _, seen = images_seen("main.py", *arguments("train", "attic.csv"), "n_workers=0", "n_epochs=1")
    assert not any(any(torch.equal(image, centre) for image in seen) for centre in centres)
