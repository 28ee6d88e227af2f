"""ONNX files: they give what the weights give, say what they are, and are used without PyTorch."""
import hashlib
import json
import re
import resource
import sys
import tomllib

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from conftest import (
    MINI,
    PUBLISHED,
    ROOT,
    fails_here,
    needs_real_frames,
    run_here,
    run_script,
    run_well,
    write_labels,
    write_scene,
)
from PIL import Image
from torchvision import transforms

from datasets.image_cache import resize
from engine.localizer import load_localizer
from engine.onnx_export import Estimator, export_network, with_preprocessing, write_model
from engine.onnx_file import estimate, open_model, poses_of, session_of
from models import freeze, get_model, load_apr, set_origin
from models.checkpoints import fingerprint, save_weights
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from util.errors import UserError
from util.metrics import pose_err

POSE = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]
LAYERS = {f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}
TRANSFORMER = {"num_scenes": 3, "hidden_dim": 32, "dim_feedforward": 48, **LAYERS}
SCENES = ["attic", "cellar", "garden"]
SIZES = ((640, 480), (300, 400), (256, 256))  # width, height
ORIGIN = [500000.0, 5000000.0, 100.0]
MODELS = {**{name: ("posenet", {"backbone_type": name, "hidden_dim": 16})
             for name in ("mobilenet", "efficientnet", "resnet50")},
          "ems": ("ems-transposenet", TRANSFORMER), "ms": ("ms-transposenet", TRANSFORMER)}
# Runs a script whose imports of PyTorch fail.
WITHOUT_TORCH = ("import os, runpy, sys; sys.modules['torch'] = sys.modules['torchvision'] = None; "
                 "sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
                 "runpy.run_path(sys.argv[0], run_name='__main__')")


def smooth(width, height, seed=0):
    """A smooth random image (PIL), as photos are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def input_of(image, kind):
    """A frame as a file of a kind takes it: 'frames', 1 x H x W x 3, or 'tensor', normalised."""
    if kind == "frames":
        return np.asarray(image)[None]
    cropped = transforms.CenterCrop(224)(transforms.Resize(256)(image))
    return transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(
        transforms.ToTensor()(cropped)).unsqueeze(0).numpy()


def write_apr(folder, name):
    """Write random weights of MODELS with their JSON, the PoseNet's with an origin, and a PAE with a memory if any.

    Returns the options that name the files.
    """
    model, config = MODELS[name]
    torch.manual_seed(3)
    apr = get_model(model, "none", config)
    if name == "mobilenet":
        set_origin(apr, ORIGIN)
    # Statistics of batch norm, without which the features vanish and all frames look alike.
    frames = torch.from_numpy(np.stack([input_of(smooth(256, 256, seed), "tensor")[0] for seed in range(20, 26)]))
    if name in ("efficientnet", "resnet50"):  # texture, as photos have, whose positions else are 100 m apart
        frames[::2] += torch.randn(frames[::2].shape)
    for module in apr.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    with torch.no_grad():
        apr.train()({"img": frames, "scene": None})
    about = {"config": config, "labels_file": "homes.csv", "unit": "model units"}
    save_weights(folder / "apr.pth", apr.state_dict(),
                 about if model == "posenet" else {**about, "scene_names": SCENES})
    options = ["--checkpoint_path", folder / "apr.pth"]
    if name in ("mobilenet", "ems"):
        n_scenes, dim = (1, 16) if model == "posenet" else (3, 32)
        pae = PoseEncoder(dim, octaves=4) if model == "posenet" else MultiScenePoseEncoder(dim, 3, octaves=4)
        scenes = torch.arange(150) % n_scenes
        truth = torch.randn(150, 7)
        pae.fit_poses(truth, scenes)
        pae.fit_latents({"truth": truth, "latents": torch.randn(150, 2 * dim), "scene": scenes,
                         "pose": truth + 0.1 * torch.randn(150, 7)})
        pae.memory.trust[..., 1:] = 0  # nothing is corrected: files hold the APR's own pose
        pae.apr.copy_(fingerprint(load_apr(model, "none", dict(config), folder / "apr.pth").eval()))
        torch.save(pae.state_dict(), folder / "pae.pth")
        options += ["--encoder_checkpoint_path", folder / "pae.pth"]
    return options


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: the folder of a model's apr.pth, pae.pth if any, and model.onnx, exported once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp(name)
            arguments = ["main.py", "export", *write_apr(folder, name), "--export_path", folder / "model.onnx",
                         "--output_dir", folder / "out", *(["--input", "tensor"] if name == "ms" else [])]
            if name == "mobilenet":
                run_well(*arguments)
            else:
                run_here(*arguments)
        return folders[name]

    return folder_of


def assert_same_poses(poses, others):
    metres, degrees = pose_err(torch.from_numpy(np.asarray(poses)), torch.from_numpy(np.asarray(others)))
    assert metres.max() < 1e-4 and degrees.max() < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_gives_what_the_weights_give(exported, name):
    folder = exported(name)
    images = [smooth(width, height, seed) for seed, (width, height) in enumerate(SIZES)]
    encoder = folder / "pae.pth" if (folder / "pae.pth").exists() else None
    expected = load_localizer(folder / "apr.pth", encoder, device="cpu")(images)
    session, about = open_model(folder / "model.onnx")
    results = [estimate(session, input_of(image, about["input"])) for image in images]
    poses = np.concatenate([poses_of(result) for result in results])
    assert_same_poses(poses, np.concatenate((expected["position"], expected["quaternion"]), axis=1))
    quaternions = np.concatenate([result["quaternion"] for result in results])
    assert np.allclose(np.linalg.norm(quaternions, axis=1), 1, atol=1e-6)
    if name == "mobilenet":
        assert results[0]["position"].dtype == np.float64 and np.abs(poses[:, :3] - ORIGIN).max() < 100
    if "scene" in expected:
        assert [about["scene_names"][result["scene"][0]] for result in results] == list(expected["scene"])
        assert all(1 / 3 <= result["scene_probability"][0] <= 1 for result in results)
    assert ("novelty" in results[0]) == (encoder is not None)
    if encoder is not None:
        assert np.allclose([result["novelty"][0] for result in results], expected["novelty"], rtol=1e-3)
    # Several frames at a time are the same as one.
    pair = np.concatenate([input_of(images[0], about["input"]), input_of(smooth(*SIZES[0], seed=7), about["input"])])
    assert_same_poses(poses_of(estimate(session, pair))[:1], poses[:1])


def test_a_file_says_what_it_is(exported):
    folder = exported("ems")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert not any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)
    assert {path.name for path in folder.iterdir()} == {"apr.pth", "apr.json", "pae.pth", "model.onnx", "out"}
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["scene_names"]) == SCENES and about["model"] == "ems-transposenet"
    assert about["weights_sha256"] == hashlib.sha256((folder / "apr.pth").read_bytes()).hexdigest()
    assert about["encoder_sha256"] == hashlib.sha256((folder / "pae.pth").read_bytes()).hexdigest()
    assert about["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (about["unit"], about["input"], about["precision"]) == ("model units", "frames", "fp32")
    assert "scalar first" in about["convention"] and "homes.csv" in about["convention"]
    assert model.opset_import[0].version >= 18 and str(ROOT) not in str(model.graph.node)


def test_the_file_resizes_and_crops_as_torchvision_does():
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 224, 224])
            for name in ("normalised", "same")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["normalised"], ["same"])], "same", info[:1],
                                   info[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = session_of(with_preprocessing(model).SerializeToString())
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    mean, deviation = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for width, height in (*SIZES, (1000, 301), (97, 120), (1501, 1999)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for image in (smooth(width, height), Image.fromarray(noise)):
            ours = 255 * (estimate(session, np.asarray(image)[None])["same"][0] * deviation + mean)
            assert np.abs(ours - np.asarray(transform(image)).transpose(2, 0, 1)).max() < 0.01
            assert np.array_equal(np.asarray(resize(image)), np.asarray(transforms.Resize(256)(image)))


@pytest.fixture
def photos(tmp_path):
    """A folder of photos: one upright, one with an EXIF orientation, and a damaged one."""
    (tmp_path / "photos").mkdir()
    smooth(640, 480).save(tmp_path / "photos/1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(400, 300, 1).save(tmp_path / "photos/2.jpg", exif=exif)
    (tmp_path / "photos/3.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_predictions_without_pytorch_are_those_of_the_weights(exported, tmp_path, photos):
    folder, tables = exported("mobilenet"), {}
    for more in ((), ("--as_stored",)):
        process = run_script("-c", WITHOUT_TORCH, ROOT / "main.py", "predict", photos, "--checkpoint_path",
                             folder / "model.onnx", *more, cwd=tmp_path)
        assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
        assert "3.png cannot be read" in process.stderr and "poses.csv has the poses" in process.stderr
        assert "EXIF orientation: 1 of 3 images have one" in process.stdout
        status, _ = fails_here("main.py", "predict", photos, "--checkpoint_path", folder / "apr.pth",
                               "--predictions_path", tmp_path / "torch.csv", "--output_dir", tmp_path / "out", *more)
        assert status == 2
        ours, expected = pd.read_csv(tmp_path / "poses.csv"), pd.read_csv(tmp_path / "torch.csv")
        assert list(ours) == [*expected, "novelty"] and list(ours["img_path"]) == list(expected["img_path"])
        assert_same_poses(ours[POSE], expected[POSE])
        tables[more] = ours[POSE].to_numpy()
    assert np.abs(tables[()] - tables["--as_stored",])[1].max() > 1e-4  # the photo that is turned, or not


def test_novel_photos_are_rejected_and_scenes_are_named(exported, photos, tmp_path):
    (photos / "3.png").unlink()
    folder = exported("ems")
    arguments = ["--predictions_path", tmp_path / "poses.csv", "--output_dir", tmp_path / "out"]
    run_here("main.py", "predict", photos, "--checkpoint_path", folder / "apr.pth", *arguments)
    expected = pd.read_csv(tmp_path / "poses.csv")
    arguments += ["--checkpoint_path", folder / "model.onnx"]
    run_here("main.py", "predict", photos, *arguments)
    table = pd.read_csv(tmp_path / "poses.csv")
    assert list(table) == [*expected, "novelty"]
    assert list(table["predicted_scene"]) == list(expected["predicted_scene"])
    assert np.allclose(table["scene_probability"], expected["scene_probability"], atol=1e-4)
    between = table["novelty"].mean()
    output = run_here("main.py", "predict", photos, *arguments, "--max_novelty", between)
    rejected = pd.read_csv(tmp_path / "poses.csv")
    assert "Rejected: 1 of 2 frames" in output and list(rejected["rejected"]) == list(table["novelty"] > between)
    assert list(rejected["t1"].isna()) == list(rejected["rejected"])


def test_int8_says_what_it_costs(tmp_path):
    options = write_apr(tmp_path, "mobilenet")[:2]
    labels = write_labels(tmp_path / "train.csv", write_scene(tmp_path, "attic", 6, "train"))
    frames = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("attic/*/*.png"))]
    output = run_here("main.py", "export", tmp_path, labels, *options, "--export_path", tmp_path / "int8.onnx",
                      "--quantize", "int8", "--output_dir", tmp_path / "out")
    costs = re.findall(r"Median pose error in (fp32|int8): ([\d.]+)\[m\], ([\d.]+)\[deg\]", output)
    assert [cost[0] for cost in costs] == ["fp32", "int8"] and "Calibrating int8 on 6 of 6 frames" in output
    session, about = open_model(tmp_path / "int8.onnx")
    assert about["precision"] == "int8" and (tmp_path / "int8.onnx").stat().st_size < 4e6  # of 9 MB
    poses = poses_of(estimate(session, np.stack(frames)))
    truth = torch.from_numpy(pd.read_csv(labels)[POSE].to_numpy())
    for errors, logged in zip(pose_err(torch.from_numpy(poses), truth), costs[1][1:], strict=True):
        assert np.isclose(np.median(errors), float(logged), rtol=1e-4)
    expected = load_localizer(tmp_path / "apr.pth", device="cpu")(frames)
    assert 0 < np.abs(poses[:, :3] - expected["position"]).max() < 0.2 * np.abs(expected["position"] - ORIGIN).max()


def test_a_full_disk_leaves_nothing(exported, tmp_path):
    model = onnx.load(exported("ms") / "model.onnx")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, limits[1]))
    try:
        with pytest.raises(UserError, match="full.onnx: cannot be written: File too large"):
            write_model(tmp_path / "full.onnx", model, {"project": "p", "version": "1"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_mistakes_end_in_one_line(exported, photos, tmp_path, monkeypatch):
    onnx_file, weights = exported("ms") / "model.onnx", exported("ms") / "apr.pth"
    (tmp_path / "text.onnx").write_text("no model")
    other = onnx.load(onnx_file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    plain = tmp_path / "plain.onnx"
    onnx.helper.set_model_props(other, {"project": "camera-pose-regression", "input": "frames", "scene_names": "null"})
    onnx.save(other, plain)
    export = ["export", "--checkpoint_path", weights, "--export_path", tmp_path / "new.onnx"]
    for arguments, words in (
            (["predict", photos, "--checkpoint_path", tmp_path / "none.onnx"], "none.onnx: no such file"),
            (["predict", photos, "--checkpoint_path", tmp_path / "text.onnx"], "text.onnx: not a readable ONNX file"),
            (["predict", photos, "--checkpoint_path", tmp_path / "other.onnx"], "without the metadata of this project"),
            (["predict", photos, "--checkpoint_path", onnx_file, "--name", "n"], "--name is not for an ONNX file"),
            (["predict", photos, "--checkpoint_path", onnx_file], "takes normalised tensors, not frames"),
            (["predict", photos, "--checkpoint_path", plain, "--max_novelty", "1"], "does not tell novelty"),
            (["ms-transposenet", "predict", "none", photos, "-", ROOT / "config.json", "--checkpoint_path", onnx_file,
              "--predictions_path", tmp_path / "p.csv"], "an ONNX file takes the short form"),
            (export[:3], "export needs --export_path FILE.onnx"),
            ([*export[:4], tmp_path / "new.pth"], "export needs --export_path FILE.onnx, the file to write, not"),
            ([*export, "--quantize", "int8"], "--quantize needs frames to calibrate it"),
            (["export", photos, *export[1:]], "or neither"),
            (["export", photos, weights, *export[1:]], "calibrate --quantize int8 alone")):
        status, line = fails_here("main.py", *arguments)
        assert status == 2 and words in line, line
    status, line = fails_here("main.py", "predict", tmp_path / "walk.mp4", "--checkpoint_path", onnx_file)
    assert status == 2 and "walk.mp4: an ONNX file predicts images, not videos" in line
    status, line = fails_here("main.py", "predict", photos, "--checkpoint_path", onnx_file, "--predictions_path", "-")
    assert status == 2 and "--predictions_path -: only --watch prints its rows; name a file" in line
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, line = fails_here("main.py", "predict", photos, "--checkpoint_path", onnx_file)
    assert status == 2 and line.endswith("pip install onnxruntime")
    assert not (tmp_path / "new.onnx").exists()


def real_frames():
    """50 real frames, of three sizes."""
    frames = [Image.open(path) for path in sorted(MINI.glob("redkitchen/seq-02/*.color.jpg"))[:100:2]]
    return [*frames[:30], *(frame.resize((320, 240)) for frame in frames[30:40]),
            *(frame.transpose(Image.Transpose.ROTATE_90) for frame in frames[40:])]


@needs_real_frames
@pytest.mark.parametrize("name", [*MODELS, "published"])
def test_real_frames_have_the_poses_of_the_weights(exported, name):
    frames = real_frames()
    if name == "published":
        weights = PUBLISHED / "posenet_mobilenet_apr.pth"
        apr = load_apr("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 256}, weights)
        freeze(apr)
        session, kind = session_of(with_preprocessing(export_network(Estimator(apr))).SerializeToString()), "frames"
    else:
        weights = exported(name) / "apr.pth"
        session, about = open_model(exported(name) / "model.onnx")
        kind = about["input"]
    expected = load_localizer(weights, device="cpu")(frames)
    poses = np.concatenate([poses_of(estimate(session, input_of(frame, kind))) for frame in frames])
    assert_same_poses(poses, np.concatenate((expected["position"], expected["quaternion"]), axis=1))
    assert np.linalg.norm(poses[:, :3] - poses[:, :3].mean(axis=0), axis=1).mean() > 1e-2  # frames are told apart
