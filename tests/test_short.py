"""predict in short, and from Python: what the weights know need not be said again."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fails_here, run_here, weights_of
from PIL import Image
from walks import pae_of

from engine.localizer import load_localizer
from models import get_model
from models.checkpoints import save_weights
from models.pose_encoder import PoseEncoder
from util.errors import UserError

POSE = ["t1", "t2", "t3", "q1", "q2", "q3", "q4"]
LAYERS = {f"num_{branch}_{part}_layers": 1 for branch in ("t", "rot") for part in ("encoder", "decoder")}
TRANSFORMER = {"num_scenes": 2, "hidden_dim": 32, "dim_feedforward": 48, **LAYERS}


@pytest.fixture
def photos(tmp_path, small_frames):
    """A folder of three photos of different shapes."""
    random = np.random.default_rng(0)
    for i, size in enumerate(((120, 90), (90, 120), (100, 100))):
        pixels = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels.resize(size).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def in_short(photos, weights, *more):
    table = photos.parent / "short.csv"
    output = run_here("main.py", "predict", photos, "--checkpoint_path", weights, "--predictions_path", table,
                      "--output_dir", photos.parent / "out", *more)
    return output, pd.read_csv(table)


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("name, config", [
    ("posenet", {"backbone_type": "mobilenet", "hidden_dim": 24}),
    ("ms-transposenet", TRANSFORMER), ("ems-transposenet", {**TRANSFORMER, "nhead": 4})])
def test_the_short_form_gives_what_the_long_form_gives(photos, name, config, with_json):
    torch.manual_seed(1)
    if not with_json:
        config = {**config, "nhead": 8}
    weights = photos.parent / "w.pth"
    save_weights(weights, get_model(name, "none", config).state_dict(),
                 {"config": {**config, "n_workers": 3, "lr": 1}, "scene_names": ["attic", "cellar"]})
    if not with_json:
        weights.with_suffix(".json").unlink()
    output, short = in_short(photos, weights)
    long_table = photos.parent / "long.csv"
    run_here("main.py", name, "predict", "none", photos, "-", ROOT / "config.json", "--checkpoint_path", weights,
             "--predictions_path", long_table, "--output_dir", photos.parent / "out", "--set",
             *(f"{key}={json.dumps(value)}" for key, value in config.items()))
    pd.testing.assert_frame_equal(short, pd.read_csv(long_table))
    assert list(short["img_path"]) == ["0.png", "1.png", "2.png"]
    picture = next(line for line in output.splitlines() if line.startswith("Picture: ")).removeprefix("Picture: ")
    assert picture.endswith("_predicted.png") and Image.open(picture).size
    if name != "posenet":
        names = {"attic", "cellar"} if with_json else {"0", "1"}
        assert set(short["predicted_scene"].astype(str)) <= names

    # From Python, it is the same; paths, PIL images and arrays are one.
    localizer = load_localizer(weights)
    paths = sorted(photos.glob("*.png"))
    for images in (paths, [Image.open(path) for path in paths], [np.asarray(Image.open(path)) for path in paths]):
        result = localizer(images)
        assert np.allclose(np.concatenate((result["position"], result["quaternion"]), axis=1), short[POSE], atol=1e-5)
        assert "scene" not in result or list(result["scene"]) == list(short["predicted_scene"].astype(str))


def test_a_pae_corrects_the_poses_of_photos_and_says_which_to_believe(photos, attic):
    pae = pae_of(attic / "apr.pth")
    pae.memory.trust[:] = torch.tensor([[0, 1, 1], [1e6, 1, 1]]).repeat(16, 1).sort(dim=0).values
    torch.save(pae.state_dict(), photos.parent / "pae.pth")
    more = "--encoder_checkpoint_path", photos.parent / "pae.pth"
    output, table = in_short(photos, attic / "apr.pth", *more, "--max_novelty", "1e9")
    assert ": 3 of 3 poses\n" in output and "Rejected: 0 of 3 frames" in output and table["novelty"].gt(0).all()
    _, alone = in_short(photos, attic / "apr.pth")
    assert np.allclose(table[[f"apr_{column}" for column in POSE]], alone[POSE], atol=1e-6)
    result = load_localizer(attic / "apr.pth", encoder=photos.parent / "pae.pth")(sorted(photos.glob("*.png")))
    assert np.allclose(result["position"], table[POSE[:3]], atol=1e-5)
    assert np.allclose(result["novelty"], table["novelty"], rtol=1e-3)
    _, rejected = in_short(photos, attic / "apr.pth", *more, "--max_novelty", "0")
    assert rejected[POSE].isna().all(axis=None) and rejected["rejected"].all()


def test_a_training_keeps_poses_to_show_predictions_among(attic, photos):
    weights = weights_of(run_here(
        "main.py", "posenet", "train", "none", attic, attic / "train.csv", ROOT / "config.json", "--output_dir",
        photos.parent / "out", "--set", "backbone_type=mobilenet", "hidden_dim=16", "n_epochs=1", "n_workers=0"))
    kept = json.loads(weights.with_suffix(".json").read_text())["training_poses"]
    labels = pd.read_csv(attic / "train.csv")
    assert [pose[0] for pose in kept] == list(labels["scene"])
    assert np.allclose([pose[1:] for pose in kept], labels[POSE], atol=1e-4)
    assert len(in_short(photos, weights)[1]) == 3


def test_mistakes_in_short_end_in_one_line(photos, attic, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(PoseEncoder(16).state_dict(), tmp_path / "pae.pth")
    for arguments, words in (
            (["--checkpoint_path", tmp_path / "none.pth"], "none.pth: no such file"),
            (["--checkpoint_path", tmp_path / "other.pth"], "weights of no model known here, but an APR's is needed"),
            (["--checkpoint_path", tmp_path / "pae.pth"], "a checkpoint of single-scene PAE, but an APR's is needed"),
            (["--checkpoint_path", attic / "apr.pth", "--encoder_checkpoint_path", tmp_path / "other.pth"],
             "but one of single-scene PAE is needed")):
        status, line = fails_here("main.py", "predict", photos, *arguments, "--output_dir", tmp_path / "out")
        assert status == 2 and words in line
    with pytest.raises(UserError, match="an APR's is needed"):
        load_localizer(tmp_path / "pae.pth")


def test_the_localizer_takes_a_list_of_images_and_says_so(photos, attic, caplog):
    torch.save(PoseEncoder(16).state_dict(), photos.parent / "published.pth")
    localizer = load_localizer(attic / "apr.pth", encoder=photos.parent / "published.pth")
    assert "poses are not corrected: " in caplog.text and "published.pth remembers no training frames" in caplog.text
    path = photos / "0.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for single in (path, str(path), Image.open(path), pixels, []):
        with pytest.raises(UserError, match="takes a list of images"):
            localizer(single)
    with pytest.raises(UserError, match="apr.onnx: an ONNX file; the weights"):
        load_localizer(photos.parent / "apr.onnx")
    for wrong in (pixels / 255, pixels[..., 0], pixels[..., :2]):
        with pytest.raises(UserError, match="an array must be uint8, height x width x 3"):
            localizer([wrong])
    listed, batch = localizer([path]), localizer(pixels[None])
    assert np.allclose(batch["position"], listed["position"], atol=1e-6) and "novelty" not in listed
