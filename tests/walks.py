"""A rendered walk and an APR that tells its frames apart, to be predicted as images, as a video, or as they arrive."""
import numpy as np
import pandas as pd
import torch
from conftest import fails_here, run_here
from PIL import Image

from datasets.synthetic_scenes.paths import camera_path
from datasets.synthetic_scenes.render import render
from datasets.synthetic_scenes.rooms import make_room
from models import get_model
from models.checkpoints import fingerprint
from models.pose_encoder import PoseEncoder

N = 24  # frames of the walk
WIDTH, HEIGHT = 160, 120


def write_walk(folder):
    """Write photos/, the frames of a walk through a room, and apr.pth, weights that tell them apart; returns folder."""
    random = np.random.default_rng(0)
    room = make_room(random)
    frames = [render(room.faces, *pose, WIDTH, HEIGHT) for pose in zip(*camera_path(room, N, random), strict=True)]
    (folder / "photos").mkdir()
    for i, pixels in enumerate(frames):
        Image.fromarray(pixels).save(folder / f"photos/{i:06d}.png")
    write_apr(folder / "apr.pth")
    return folder


def write_apr(path):
    """Write weights of a small PoseNet. Batch norm's statistics are of noise, so that its latents tell images apart."""
    torch.manual_seed(0)
    model = get_model("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 16})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model({"img": torch.randn(4, 3, 224, 224)})
    torch.save(model.state_dict(), path)


def pae_of(apr_path):
    """A PAE of the small PoseNet in a file, with a memory of random frames."""
    torch.manual_seed(0)
    apr = get_model("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 16})
    apr.load_state_dict(torch.load(apr_path))
    pae = PoseEncoder(16, octaves=4)
    frames = {"truth": torch.randn(60, 7), "latents": torch.randn(60, 32), "scene": torch.zeros(60, dtype=torch.long)}
    pae.fit_latents({**frames, "pose": frames["truth"] + 0.1})
    pae.apr.copy_(fingerprint(apr.eval()))
    return pae


def predict(walk, images, *more):
    """What predict prints, and its table."""
    table = walk / "poses.csv"
    output = run_here("main.py", "predict", images, "--checkpoint_path", walk / "apr.pth", "--predictions_path", table,
                      "--output_dir", walk / "out", *more, "--set", "n_workers=0")
    return output, pd.read_csv(table)


def fails(walk, images, *more):
    (walk / "poses.csv").unlink(missing_ok=True)
    return fails_here("main.py", "predict", images, "--checkpoint_path", walk / "apr.pth", "--predictions_path",
                      walk / "poses.csv", "--output_dir", walk / "out", *more)
