"""The models compute what the published ones do, on weights from a formula (tests/golden, described in its README)."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models import get_model, infer
from models.iapr import IAPR, moved_back, relative_pose
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from util.config import Config
from util.losses import CameraPoseLoss
from util.metrics import pose_err

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text())["models"]
IMAGES = torch.tensor(np.random.RandomState(7).standard_normal((3, 3, 224, 224)), dtype=torch.float32)
POSES = np.random.RandomState(8).standard_normal((5, 7)).astype(np.float32)
POSES[:, 3:] /= np.linalg.norm(POSES[:, 3:], axis=1, keepdims=True)
POSES = torch.tensor(POSES)
TRANSFORMER = {"num_t_encoder_layers": 6, "num_t_decoder_layers": 6, "num_rot_encoder_layers": 6,
               "num_rot_decoder_layers": 6, "dim_feedforward": 256, "reduction": ["reduction_4", "reduction_3"],
               "hidden_dim": 256, "num_scenes": 7, "nheads": 4}


def build(name):
    if name.startswith("posenet"):
        return get_model("posenet", "none", {"backbone_type": name.split("-")[1], "hidden_dim": 256})
    if name == "ems-transposenet-rot4":
        return get_model("ems-transposenet", "none",
                         {**TRANSFORMER, "num_rot_encoder_layers": 4, "num_rot_decoder_layers": 4})
    if "transposenet" in name:
        return get_model(name, "none", TRANSFORMER)
    shallow = name.endswith("shallow")
    if name.startswith("multi"):
        return MultiScenePoseEncoder(256, num_scenes=7, shallow_mlp=shallow)
    return PoseEncoder(256, apply_positional_encoding=not name.endswith("no-fourier"), shallow_mlp=shallow)


def formula_weights(shapes, gain):
    """Return the weights of tests/golden/README.md, which depend on the keys' names and shapes alone."""
    weights = {}
    for key, shape in shapes.items():
        n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        if key.endswith("running_var"):
            n = 1 + 0.1 * np.abs(n)
        elif key.endswith("running_mean"):
            n = 0.1 * n
        elif len(shape) >= 2:
            n = gain * n / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("weight"):
            n = 1 + 0.1 * n
        else:
            n = 0.1 * n
        weights[key] = torch.tensor(np.asarray(n), dtype=torch.float32)
    return weights


def assert_golden(ours, golden):
    assert ours.shape == golden.shape
    assert np.abs(ours - golden).max() <= 1e-4 * np.abs(golden).max()


@pytest.mark.parametrize("name", [name for name in INDEX if name not in ("metrics", "iapr")])
def test_model_equals_the_published_one(name):
    entry = INDEX[name]
    model = build(name).eval()
    ours = {"centre", "scale", "mean_orientation", "noise", "memory", "apr"}  # what only our PAEs have
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if key.split(".")[0] not in ours}
    assert shapes == entry["state_dict"]
    model.load_state_dict(formula_weights(entry["state_dict"], entry["gain"]))
    golden = np.load(GOLDEN / f"{name}.npz")
    with torch.no_grad():
        if "encoder" in name:
            inputs = (POSES, torch.tensor(golden["scene"])) if name.startswith("multi") else (POSES,)
            result = dict(zip(("latent_x", "latent_q"), model(*inputs)))
        else:
            result = model({"img": IMAGES, "scene": None})
        if "given_scene" in golden:
            given = model({"img": IMAGES, "scene": torch.tensor(golden["given_scene"])})
            result["pose_given_scene"] = given["pose"]
    compared = set(golden.files) - {"given_scene", "scene"}
    assert compared == set(result)
    for key in compared:
        assert_golden(result[key].numpy(), golden[key])


def test_iapr_equals_the_published_one():
    entry, golden = INDEX["iapr"], np.load(GOLDEN / "iapr.npz")
    apr, iapr = build("ems-transposenet").eval(), IAPR(Config(TRANSFORMER)).eval()
    assert {key: list(value.shape) for key, value in iapr.state_dict().items()} == entry["state_dict"]
    iapr.load_state_dict(formula_weights(entry["state_dict"], entry["gain"]))
    of_apr = INDEX["ems-transposenet"]
    apr.load_state_dict(formula_weights(of_apr["state_dict"], of_apr["gain"]))
    with torch.no_grad():
        first = infer(apr, IMAGES)
        assert first["scene"].tolist() == golden["scene"].tolist()
        unit = torch.nn.functional.normalize(first["pose"][:, 3:], dim=1)
        pose = torch.cat((first["pose"][:, :3], unit), dim=1)
        assert_golden(iapr(IMAGES, first["scene"], pose).numpy(), golden["rel_pose"])
        for n, tolerance in ((1, 1e-4), (2, 1e-3), (3, 1e-2)):  # iterating amplifies rounding
            refined = iapr.refine(IMAGES, first["scene"], first["pose"], n).numpy()
            assert np.abs(refined - golden[f"pose_{n}"]).max() <= tolerance * np.abs(golden[f"pose_{n}"]).max()
        assert torch.allclose(moved_back(POSES, relative_pose(POSES.flip(0), POSES)), on_side(POSES.flip(0)), atol=1e-5)


def on_side(poses):
    """Poses with positive scalars."""
    return torch.cat((poses[:, :3], poses[:, 3:] * poses[:, 3:4].sign()), dim=1)


def test_metrics_and_losses_equal_the_published_ones():
    golden = np.load(GOLDEN / "metrics.npz")
    estimate = torch.tensor(np.random.RandomState(13).standard_normal((5, 7)), dtype=torch.float32)
    estimate[:, 3:] *= torch.sign((estimate[:, 3:] * POSES[:, 3:]).sum(1, keepdim=True))
    position, orientation = pose_err(estimate, POSES)
    assert_golden(position.numpy(), golden["position_error"])
    assert_golden(orientation.numpy(), golden["orientation_error"])
    for name, s_x, s_q in (("learnable", -3.0, -6.5), ("fixed", 1.0, 10.0)):
        for norm in (1, 2):
            loss = CameraPoseLoss({"learnable": name == "learnable", "norm": norm, "s_x": s_x, "s_q": s_q})
            assert_golden(loss(estimate, POSES).detach().numpy(), golden[f"loss_{name}_norm{norm}"])
