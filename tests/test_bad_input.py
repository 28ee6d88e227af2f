"""A user's mistakes: one clear line, the last on stderr, exit status 2, and nothing written but the log."""
import json
import os

import pytest
import torch
from conftest import ROOT, run_here, run_script, write_labels, write_scene

from models import APR_NAMES, get_model
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder

SMALL = {"hidden_dim": 16, "num_scenes": 2, "dim_feedforward": 8, "nhead": 2, "backbone_type": "mobilenet",
         **{f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}}


class MarksItsRun:
    """Its pickle makes a folder when it is loaded as code."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a small layout, label files, configs and weights, good and bad."""
    root = tmp_path_factory.mktemp("bad")
    write_label_files(root)
    write_configs(root)
    write_checkpoints(root)
    (root / "no_images").mkdir()
    return root


def write_label_files(root):
    rows, test_rows = write_scene(root, "attic", 3, "train"), write_scene(root, "attic", 2, "test")
    write_labels(root / "train.csv", rows)
    write_labels(root / "test.csv", test_rows)
    write_labels(root / "shared.csv", [*rows, test_rows[0]])
    write_labels(root / "no_image.csv", [rows[0], rows[1].replace("frame-000001", "frame-000009")])
    write_labels(root / "unreadable.csv", [rows[0], rows[1].replace("frame-000001", "broken")])
    frames = root / "attic" / "seq-train"
    (frames / "broken.color.png").write_bytes((frames / "frame-000001.color.png").read_bytes()[:300])
    write_labels(root / "not_a_number.csv", [rows[0], rows[1].rsplit(",", 1)[0] + ",north"])
    write_labels(root / "empty.csv", [])
    (root / "no_column.csv").write_text((root / "train.csv").read_text().replace("q4", "q5"))
    (root / "nothing.csv").write_text("")
    write_labels(root / "three_scenes.csv", [row.replace("attic,", f"{scene},") for row, scene in zip(rows, "abc")])
    write_labels(root / "lone_frame.csv", [rows[0], rows[1], rows[2].replace("attic,", "cellar,")])
    write_labels(root / "same_poses.csv", [rows[0], with_pose_of(rows[1], test_rows[1], sign=1),
                                           with_pose_of(rows[2], test_rows[0], sign=-1)])


def with_pose_of(row, other, sign):
    """A row with the pose of another, up to rounding; its quaternion is multiplied by a sign."""
    pose = [float(number) for number in other.split(",")[4:]]
    pose = [*(number + 4e-7 for number in pose[:3]), *(sign * number for number in pose[3:])]
    return ",".join([*row.split(",")[:4], *(f"{number:.9f}" for number in pose)])


def write_configs(root):
    section = {**SMALL, "batch_size": 2, "learnable": True, "s_x": 0, "s_q": 0, "norm": 2, "lr": 1e-3,
               "weight_decay": 0, "eps": 1e-8, "lr_scheduler_step_size": 1, "lr_scheduler_gamma": 0.5, "n_epochs": 1}
    config = {"general": {"n_freq_print": 1, "n_freq_checkpoint": 1, "n_workers": 0},
              **{name: section for name in APR_NAMES},
              "presets": {"known": {"posenet": {}}, "wrong_names": {"scene_names": ["a", "b"], "ems-transposenet": {}}}}
    incomplete = {key: value for key, value in section.items() if key != "lr"}
    for name, content in (
            ("config", config),
            ("incomplete", {**config, "posenet": incomplete}),
            ("without_size", {**config, "posenet": {k: v for k, v in section.items() if k != "hidden_dim"}}),
            ("wrong_type", {**config, "posenet": {**section, "n_epochs": "many"}}),
            ("odd", {**config, "presets": {"text": "posenet", "nothing": {"posenet": 3}}})):
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "not_json.json").write_text("{")


def write_checkpoints(root):
    for name in APR_NAMES:
        torch.save(get_model(name, "none", SMALL).state_dict(), root / f"{name}.pth")
    of_three_scenes = get_model("ems-transposenet", "none", {**SMALL, "num_scenes": 3})
    torch.save(of_three_scenes.state_dict(), root / "three_scenes.pth")
    torch.save(PoseEncoder(16).state_dict(), root / "pae.pth")
    failed = PoseEncoder(16).state_dict()
    failed["noise"] = failed["noise"] / 0
    torch.save(failed, root / "nan_pae.pth")
    old_refiner = {"hidden.0.weight": torch.zeros(256, 64), "q_reg.weight": torch.zeros(4, 256)}
    torch.save(old_refiner, root / "old_refiner.pth")
    torch.save(MultiScenePoseEncoder(16, SMALL["num_scenes"]).state_dict(), root / "multi_pae.pth")
    (root / "truncated.pth").write_bytes((root / "posenet.pth").read_bytes()[:5000])
    (root / "text.pth").write_text("these are no weights\n")
    (root / "empty.pth").write_bytes(b"")
    torch.save({"weights": MarksItsRun()}, root / "hostile.pth")
    torch.save({"x_encoder.0.weight": torch.zeros(64, 39)}, root / "odd.pth")
    torch.save({"weights": [1, 2]}, root / "not_tensors.pth")
    damaged = torch.load(root / "posenet.pth")
    del damaged["q_reg.bias"]
    torch.save(damaged, root / "incomplete.pth")


def apr(model="posenet", mode="train", backbone="none", labels="train.csv", config="config.json", more=()):
    return ["main.py", model, mode, backbone, ".", labels, config, *more]


def apr_test(checkpoint, model="posenet", more=()):
    return apr(model, "test", more=["--checkpoint_path", checkpoint, *more])


def predict(images, labels="-"):
    return ["main.py", "posenet", "predict", "none", images, labels, "config.json", "--checkpoint_path", "posenet.pth",
            "--predictions_path", "predicted.csv"]


def pae(model="posenet", checkpoint="posenet.pth", mode="train", script="main_learn_pose_encoding.py", more=()):
    return [script, model, mode, "none", ".", "train.csv", "config.json", checkpoint, *more]


def optimize(references, encoder="pae.pth"):
    return refine("--ref_poses_file", references, mode="optimize", encoder=encoder)


def refine(*more, mode="test", labels="test.csv", encoder="pae.pth", model="posenet"):
    return ["main_refine_apr.py", model, mode, "none", ".", labels, "config.json", f"{model}.pth", encoder, *more]


CASES = {
    # label files and frames
    "missing image": (apr(labels="no_image.csv"),
                      ["no_image.csv: row 3: image", "frame-000009.color.png does not exist"]),
    "unreadable image": (apr(labels="unreadable.csv"),
                         ["unreadable.csv: row 3: image", "broken.color.png cannot be read"]),
    "unreadable image in a worker": (apr(mode="test", labels="unreadable.csv",
                                         more=["--checkpoint_path", "posenet.pth", "--set", "n_workers=1"]),
                                     ["unreadable.csv: row 3: image", "broken.color.png cannot be read"]),
    "a file for a cache folder": (apr(more=["--cache_dir", "train.csv"]), ["train.csv/", ".frames: cannot be written"]),
    "missing column": (apr(labels="no_column.csv"), ["no_column.csv: column 'q4' is missing", "t1,t2,t3,q1,q2,q3,q4"]),
    "no number": (apr(labels="not_a_number.csv"), ["not_a_number.csv: row 3: q4 'north' is not a finite number"]),
    "no rows": (apr(labels="empty.csv"), ["empty.csv: no rows"]),
    "no header": (apr(labels="nothing.csv"), ["nothing.csv: not a readable label file"]),
    "no label file": (apr(labels="absent.csv"), ["absent.csv: not a readable label file: No such file"]),
    "a folder for a label file": (apr(labels="attic"), ["attic: not a readable label file"]),
    "too many scenes": (apr("ems-transposenet", labels="three_scenes.csv"),
                        ["three_scenes.csv: 3 scenes, but num_scenes is 2"]),
    "unknown scene": (apr("ems-transposenet", more=["--preset", "wrong_names"]),
                      ["train.csv: row 2: scene 'attic' is not among the scene_names a, b"]),
    # weights and models
    "checkpoint of another model": (
        apr_test("ems-transposenet.pth"),
        ["ems-transposenet.pth: a checkpoint of ems-transposenet, but one of posenet is needed"]),
    "ms checkpoint for ems": (apr_test("ms-transposenet.pth", "ems-transposenet"),
                              ["a checkpoint of ms-transposenet, but one of ems-transposenet is needed"]),
    "checkpoint of a PAE": (apr_test("pae.pth"),
                            ["pae.pth: a checkpoint of single-scene PAE, but one of posenet is needed"]),
    "checkpoint of other scenes": (apr_test("three_scenes.pth", "ems-transposenet"), ["num_scenes 3", "config says 2"]),
    "incomplete checkpoint": (apr_test("incomplete.pth"), ["incomplete.pth: does not fit the model", "q_reg.bias"]),
    "truncated checkpoint": (apr_test("truncated.pth"), ["truncated.pth: not a readable weights file"]),
    "text for a checkpoint": (apr_test("text.pth"), ["text.pth: not a readable weights file"]),
    "empty checkpoint": (apr_test("empty.pth"), ["empty.pth: not a readable weights file"]),
    "absent checkpoint": (apr_test("absent.pth"), ["absent.pth: no such file"]),
    "checkpoint without tensors": (apr_test("not_tensors.pth"), ["not_tensors.pth: not a state dict"]),
    "checkpoint of odd tensors": (apr_test("odd.pth"), ["odd.pth: weights of no model known here"]),
    "checkpoint that runs code": (apr_test("hostile.pth"), ["hostile.pth: ", "mkdir", "code from a file is never run"]),
    "backbone that runs code": (apr(backbone="hostile.pth"),
                                ["hostile.pth: ", "mkdir", "code from a file is never run"]),
    "backbone of another network": (apr(backbone="pae.pth"), ["pae.pth: not the weights of a mobilenet backbone"]),
    "unknown backbone": (apr(backbone="resnet"),
                         ["backbone 'resnet': no such file; give a weights file, 'imagenet' or 'none'"]),
    "unknown backbone_type": (apr(more=["--set", "backbone_type=vgg"]),
                              ["--set: backbone_type is \"vgg\"", "\"mobilenet\""]),
    "unknown model": (apr("posenets"),
                      ["unknown model 'posenets': choose posenet or ms-transposenet or ems-transposenet"]),
    "model of another script": (pae("ems-transposenet"), ["ems-transposenet is not for this script: choose posenet"]),
    # modes, presets and the config
    "unknown mode": (apr(mode="trian"), ["MODE", "'trian'"]),
    "unknown preset": (apr(more=["--preset", "8Scenes"]),
                       ["config.json: unknown preset '8Scenes'; the file has known"]),
    "preset of another model": (apr(more=["--preset", "wrong_names"]), ["preset 'wrong_names' is not for posenet"]),
    "preset that is no object": (apr(config="odd.json", more=["--preset", "text"]),
                                 ["odd.json: section 'text' is not a JSON object"]),
    "preset for no model": (apr(config="odd.json", more=["--preset", "nothing"]),
                            ["odd.json: preset 'nothing' is not for posenet, but for none"]),
    "more names than scenes": (apr("ems-transposenet", more=["--preset", "wrong_names", "--set", "num_scenes=1"]),
                               ["scene_names has 2 names but num_scenes is 1"]),
    "fine-tuning scenes of unknown order": (apr("ems-transposenet", more=["--checkpoint_path", "ems-transposenet.pth"]),
                                            ["train.csv: 1 scenes, but the model has 2: their order is not known"]),
    "one endpoint": (apr("ems-transposenet", more=["--set", 'reduction=["reduction_4"]']),
                     ["reduction is", "a list of two endpoints"]),
    "unknown precision": (apr(more=["--set", "precision=fp8"]),
                          ['precision is "fp8"', '"fp32", "bf16", "fp16", "auto"']),
    "unknown key": (apr(more=["--set", "n_epoch=3"]), ["unknown key 'n_epoch'; did you mean n_epochs?"]),
    "no value": (apr(more=["--set", "n_epochs"]), ["--set n_epochs: not of the form key=value"]),
    "value of a wrong type": (apr(more=["--set", "n_epochs=1.5"]), ["n_epochs is 1.5, but it must be a whole number"]),
    "flag of a wrong type": (apr(more=["--set", "learnable=1"]), ["learnable is 1, but it must be true or false"]),
    "wrong type in the file": (apr(config="wrong_type.json"), ["wrong_type.json: n_epochs is \"many\""]),
    "missing key": (apr(config="incomplete.json"), ["incomplete.json", "required key 'lr' is missing"]),
    "missing key of the model": (apr(config="without_size.json"), [
        "without_size.json, section 'posenet': the required key 'hidden_dim' is missing"]),
    "config that is not JSON": (apr(config="not_json.json"), ["not_json.json: not a readable JSON config"]),
    "absent config": (apr(config="absent.json"), ["absent.json: not a readable JSON config"]),
    # options
    "freeze that leaves nothing": (
        apr("ems-transposenet", labels="lone_frame.csv",
            more=["--set", "freeze=true", "freeze_exclude_phrase=transformer_t"]),
        ["freeze_exclude_phrase 'transformer_t' leaves no head to train"]),
    "freeze for posenet": (apr(more=["--set", "freeze=true"]), ["freeze is for multi-scene models"]),
    "seed": (apr(more=["--seed", "-1"]), ["--seed", "'-1' is not a whole number from 0"]),
    "seed beyond any": (apr(more=["--seed", str(2 ** 64)]), ["--seed", "is not a whole number from 0"]),
    "unknown device": (apr(more=["--device", "gpu"]), ["device 'gpu' is unknown: choose auto, cpu, cuda or cuda:N"]),
    "absent device": (apr(more=["--device", "cuda:77"]), ["device 'cuda:77' is not here"]),
    "test without weights": (apr(mode="test"), ["test needs --checkpoint_path"]),
    "novelty without a PAE": (apr_test("posenet.pth", more=["--max_novelty", "2", "--predictions_path", "p.csv"]),
                              ["--max_novelty needs --encoder_checkpoint_path"]),
    "novelty without predictions": (
        apr_test("posenet.pth", more=["--max_novelty", "2", "--encoder_checkpoint_path", "pae.pth"]),
        ["give that too"]),
    "iAPR of a single scene": (refine("--method", "iapr", mode="train"), ["iAPR refines poses of ems-transposenet"]),
    "iAPR in a test": (refine("--method", "iapr", "--rpr_checkpoint_path", "r.pth"), ["--method is for train"]),
    "novelty of ms-transposenet": (
        apr_test("ms-transposenet.pth", "ms-transposenet", more=["--encoder_checkpoint_path", "pae.pth"]),
        ["ms-transposenet returns no latents"]),
    "novelty in training": (apr(more=["--encoder_checkpoint_path", "pae.pth"]), ["is for test, predict and export"]),
    "predictions over the labels": (apr_test("posenet.pth", more=["--predictions_path", "./train.csv"]),
                                    ["--predictions_path ./train.csv: is the label file train.csv"]),
    "predictions to a folder": (apr_test("posenet.pth", more=["--predictions_path", "."]),
                                ["--predictions_path .: is a folder"]),
    "predictions in training": (apr(more=["--predictions_path", "p.csv"]), ["--predictions_path is for testing"]),
    # predict
    "predict of a folder without images": (predict("no_images"),
                                           ["no_images: no image; give a folder with images, an image, or a pattern"]),
    "predict of images that are none": (predict("*.csv"), ["problems: image ", "empty.csv cannot be read"]),
    "predict without weights": (["main.py", "posenet", "predict", "none", "attic", "-", "config.json"],
                                ["predict needs --checkpoint_path"]),
    "predict with labels": (predict("attic", labels="train.csv"),
                            ["predict takes images in the place of the dataset, - in that of"]),
    "predict of a PAE's script": (pae(mode="predict"), ["MODE", "'predict'"]),
    # PAEs and refinement
    "PAE of ms-transposenet": (pae("ms-transposenet", script="main_learn_multiscene_pose_encoding.py"),
                               ["ms-transposenet returns no latents", "choose ems-transposenet"]),
    "refiner of ms-transposenet": (refine(model="ms-transposenet"), ["ms-transposenet returns no latents"]),
    "PAE test without weights": (pae(mode="test"), ["a test needs --encoder_checkpoint_path"]),
    "PAE of the other kind": (
        pae(mode="test", more=["--encoder_checkpoint_path", "multi_pae.pth"]),
        ["multi_pae.pth: a checkpoint of multi-scene PAE, but one of single-scene PAE is needed"]),
    "refiner test without weights": (refine(), ["a test needs --rpr_checkpoint_path"]),
    "optimize without references": (refine(mode="optimize"), ["mlp needs --ref_poses_file", "kernel, which needs none",
                                                           "fewer than 32 per scene"]),
    "optimize by a memory that the PAE lacks": (refine("--solver", "kernel", mode="optimize"),
                                                ["does not hold the memory of training frames", "--fit_noise"]),
    "novelty of a PAE without memory": ([*optimize("train.csv"), "--max_novelty", "2", "--predictions_path", "p.csv"],
                                        ["--max_novelty needs novelty: pae.pth remembers no training frames",
                                         "fewer than 32", "--fit_noise"]),
    "weights of two trainings": (pae(more=["ems-transposenet.pth"]),
                                 ["unrecognized arguments: ems-transposenet.pth", "several files: name one"]),
    "predict by weights of two trainings": (
        ["main.py", "predict", "attic", "--checkpoint_path", "posenet.pth", "pae.pth"],
        ["unrecognized arguments: pae.pth", "several files: name one"]),
    "predict by swapped weights": (
        ["main.py", "predict", "attic", "--checkpoint_path", "pae.pth", "--encoder_checkpoint_path", "posenet.pth"],
        ["pae.pth: a checkpoint of single-scene PAE, but an APR's is needed; are the two files swapped?"]),
    "noise without references": (refine("--fit_noise", mode="optimize"), ["with --ref_poses_file"]),
    "references are the tested file": (optimize("test.csv"), ["is the label file under test, all 2 of its poses"]),
    "references are the tested file, by another path": (optimize("./test.csv"), ["is the label file under test"]),
    "references share a frame": (optimize("shared.csv"),
                                 ["1 of its frames are among those under test (row 5: attic/seq-test/"]),
    "references have a query's pose": (optimize("same_poses.csv"),
                                       ["2 of its poses equal one of a frame under test", "(row 3: "]),
    "references of another scene": (optimize("three_scenes.csv"),
                                    ["has the scenes a, b, c, but the frames under test are of the scene attic"]),
    "references that are missing": (optimize("nowhere.csv"), ["nowhere.csv"]),
    "PAE of the other kind to optimize with": (optimize("train.csv", encoder="multi_pae.pth"),
                                               ["a checkpoint of multi-scene PAE"]),
    "PAE of a training that failed": (optimize("train.csv", encoder="nan_pae.pth"),
                                      ["nan_pae.pth: noise is not finite"]),
    "earlier refiner": (refine("--rpr_checkpoint_path", "old_refiner.pth"),
                        ["old_refiner.pth: a checkpoint of a refiner of an earlier version"]),
}


@pytest.fixture
def fail_here(files, monkeypatch, capfd):
    """Run a script that must fail in the folder of `files`; returns its exit status and stderr."""
    monkeypatch.chdir(files)

    def run(command):
        with pytest.raises(SystemExit) as stopped:
            run_here(*command)
        return stopped.value.code, capfd.readouterr().err
    return run


def listing(folder):
    """What must not change: all paths below a folder but logs and their folder."""
    return {path for path in folder.rglob("*") if path.suffix != ".log" and path.name != "out"}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_clear_line(case, files, fail_here):
    command, words = CASES[case]
    before = listing(files)
    status, stderr = fail_here(command)
    last = stderr.rstrip().splitlines()[-1]
    assert status == 2 and last.startswith(f"{command[0]}: error: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in stderr
    assert listing(files) == before


def test_an_error_is_in_the_log_too_and_a_process_exits_with_2(files):
    process = run_script(ROOT / "main.py", *apr(labels="empty.csv")[1:], "--output_dir", "one", cwd=files)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    [log] = (files / "one").iterdir()
    assert "empty.csv: no rows" in log.read_text()


def test_an_output_folder_that_cannot_be_written_is_named(files, fail_here):
    status, stderr = fail_here(apr(more=["--output_dir", "train.csv/out"]))
    assert status == 2 and "--output_dir train.csv/out: cannot be written" in stderr.rstrip().splitlines()[-1]
