"""Our models on the weights and inputs of tests/golden/README.md, and the published models' outputs for them."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

from models import get_model, infer
from models.iapr import IAPR
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from util.config import Config
from util.rotations import unit_poses

FOLDER = Path(__file__).parent.parent / "tests" / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())["models"]
MODELS = [name for name in INDEX if name not in ("metrics", "iapr")]
IMAGES = torch.tensor(np.random.RandomState(7).standard_normal((3, 3, 224, 224)), dtype=torch.float32)
POSES = np.random.RandomState(8).standard_normal((5, 7)).astype(np.float32)
POSES[:, 3:] /= np.linalg.norm(POSES[:, 3:], axis=1, keepdims=True)
POSES = torch.tensor(POSES)
TRANSFORMER = {"num_t_encoder_layers": 6, "num_t_decoder_layers": 6, "num_rot_encoder_layers": 6,
               "num_rot_decoder_layers": 6, "dim_feedforward": 256, "reduction": ["reduction_4", "reduction_3"],
               "hidden_dim": 256, "num_scenes": 7, "nheads": 4}


def published(name):
    """The published outputs of a model: an NpzFile."""
    return np.load(FOLDER / f"{name}.npz")


def build(name):
    """The model of a name in INDEX, with random weights, in eval mode."""
    if name.startswith("posenet"):
        model = get_model("posenet", "none", {"backbone_type": name.split("-")[1], "hidden_dim": 256})
    elif name == "ems-transposenet-rot4":
        model = get_model("ems-transposenet", "none",
                          {**TRANSFORMER, "num_rot_encoder_layers": 4, "num_rot_decoder_layers": 4})
    elif "transposenet" in name:
        model = get_model(name, "none", TRANSFORMER)
    elif name == "iapr":
        model = IAPR(Config(TRANSFORMER))
    elif name.startswith("multi"):
        model = MultiScenePoseEncoder(256, num_scenes=7, shallow_mlp=name.endswith("shallow"))
    else:
        model = PoseEncoder(256, apply_positional_encoding=not name.endswith("no-fourier"),
                            shallow_mlp=name.endswith("shallow"))
    return model.eval()


def filled(name, device="cpu"):
    """The model with the weights of the formula."""
    model, entry = build(name), INDEX[name]
    model.load_state_dict(formula_weights(entry["state_dict"], entry["gain"]))
    return model.to(device)


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


@torch.no_grad()
def outputs(name, device="cpu"):
    """The outputs of one of MODELS, under the names of the published ones: arrays."""
    model, golden = filled(name, device), published(name)
    if "encoder" in name:
        scenes = (torch.tensor(golden["scene"], device=device),) if name.startswith("multi") else ()
        result = dict(zip(("latent_x", "latent_q"), model(POSES.to(device), *scenes)))
    else:
        images = IMAGES.to(device)
        result = model({"img": images, "scene": None})
        if "given_scene" in golden:
            given = model({"img": images, "scene": torch.tensor(golden["given_scene"], device=device)})
            result["pose_given_scene"] = given["pose"]
    return {key: value.cpu().numpy() for key, value in result.items()}


@torch.no_grad()
def outputs_of_iapr(device="cpu", n_iterations=3):
    """iAPR's outputs, of up to n_iterations, under the names of the published ones: arrays."""
    apr, iapr, images = filled("ems-transposenet", device), filled("iapr", device), IMAGES.to(device)
    first = infer(apr, images)
    result = {"scene": first["scene"], "rel_pose": iapr(images, first["scene"], unit_poses(first["pose"]))}
    for n in range(1, n_iterations + 1):
        result[f"pose_{n}"] = iapr.refine(images, first["scene"], first["pose"], n)
    return {key: value.cpu().numpy() for key, value in result.items()}


def difference(ours, golden):
    """The largest difference of two arrays of one shape, relative to the largest published number."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return float(np.abs(ours - golden).max() / np.abs(golden).max())
