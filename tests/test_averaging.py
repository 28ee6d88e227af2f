"""Stochastic weight averaging: the final weights are the mean over the last steps, also of a resumed training."""
import re
import shutil

import torch
import torch.nn.functional as F
from conftest import run_here, same_weights, weights_of
from trainings import interrupt, training

from datasets.camera_poses import CameraPoseDataset
from datasets.transforms import to_input


def test_the_final_weights_are_the_mean_over_the_last_part(attic):
    # Batches of all six frames: an epoch is a step, and its checkpoint the weights after that step.
    settings = {"batch_size": 6, "n_freq_checkpoint": 1, "no_augment": "true"}
    final = weights_of(run_here("main.py", *training(attic, "mean", average_last=0.5, **settings)))
    steps = [torch.load(str(final).replace("final", f"checkpoint-{epoch}")) for epoch in (3, 4)]
    weights = torch.load(final)
    for key, value in weights.items():
        if value.is_floating_point() and "running" not in key:
            assert torch.allclose(value, (steps[0][key] + steps[1][key]) / 2, atol=1e-6), key
    # Batch norm's statistics are those of the frames under the mean weights, here of the first convolution's output.
    images = to_input(torch.stack([item["img"] for item in CameraPoseDataset(attic, attic / "train.csv")]))
    maps = F.conv2d(images, weights["backbone.0.0.0.weight"], stride=2, padding=1)
    assert torch.allclose(weights["backbone.0.0.1.running_mean"], maps.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(weights["backbone.0.0.1.running_var"], maps.var(dim=(0, 2, 3)), rtol=1e-3)
    last = weights_of(run_here("main.py", *training(attic, "last", average_last=0, **settings)))
    assert all(torch.equal(value, steps[1][key]) for key, value in torch.load(last).items())


def test_a_resumed_average_over_other_steps_begins_anew(attic):
    interrupt("main.py", training(attic, "averaged", average_last=0.9), 3)
    longer = {"n_epochs": 6, "average_last": 0.3}
    resumed = weights_of(run_here("main.py", *training(attic, "averaged", "--resume", "latest", **longer)))
    whole = weights_of(run_here("main.py", *training(attic, "whole", **longer)))
    assert same_weights(whole, resumed)


def test_an_average_that_should_have_begun_before_the_resumed_epoch_continues_when_resumed_again(attic):
    interrupt("main.py", training(attic, "once", average_last=0.1), 5)
    shutil.copytree(attic / "once", attic / "twice")
    longer = {"average_last": 0.9, "n_epochs": 6}
    once = weights_of(run_here("main.py", *training(attic, "once", "--resume", "latest", **longer)))
    interrupt("main.py", training(attic, "twice", "--resume", "latest", **longer), 3)
    _, message = interrupt("main.py", training(attic, "twice", "--resume", "latest", **longer), 3)
    # The second process averages already, but from later than an uninterrupted training would have.
    assert re.search("it is saved up to epoch [34]", message)
    twice = weights_of(run_here("main.py", *training(attic, "twice", "--resume", "latest", **longer)))
    assert same_weights(once, twice)
