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
    torch.manual_seed(0)
    model = get_model("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 16})
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model({"img": torch.randn(4, 3, 224, 224)})
    torch.save(model.state_dict(), folder / "apr.pth")
    return folder


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
