"""The models compute what the published ones do, on weights from a formula (tests/golden, described in its README)."""
import numpy as np
import pytest
import torch

from bench.golden import INDEX, MODELS, POSES, build, difference, outputs, outputs_of_iapr, published
from models.iapr import moved_back, relative_pose
from util.losses import CameraPoseLoss
from util.metrics import pose_err


def assert_golden(ours, golden, tolerance=1e-4):
    assert difference(ours, golden) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_the_published_one(name):
    ours = {"centre", "scale", "mean_orientation", "noise", "memory", "apr"}  # what only our PAEs have
    weights = build(name).state_dict()
    shapes = {key: list(value.shape) for key, value in weights.items() if key.split(".")[0] not in ours}
    assert shapes == INDEX[name]["state_dict"]
    golden, result = published(name), outputs(name)
    compared = set(golden.files) - {"given_scene", "scene"}
    assert compared == set(result)
    for key in compared:
        assert_golden(result[key], golden[key])


def test_iapr_equals_the_published_one():
    golden, result = published("iapr"), outputs_of_iapr()
    shapes = {key: list(value.shape) for key, value in build("iapr").state_dict().items()}
    assert shapes == INDEX["iapr"]["state_dict"]
    assert result["scene"].tolist() == golden["scene"].tolist()
    assert_golden(result["rel_pose"], golden["rel_pose"])
    for n, tolerance in ((1, 1e-4), (2, 1e-3), (3, 1e-2)):  # iterating amplifies rounding
        assert_golden(result[f"pose_{n}"], golden[f"pose_{n}"], tolerance)
    assert torch.allclose(moved_back(POSES, relative_pose(POSES.flip(0), POSES)), on_side(POSES.flip(0)), atol=1e-5)


def on_side(poses):
    """Poses with positive scalars."""
    return torch.cat((poses[:, :3], poses[:, 3:] * poses[:, 3:4].sign()), dim=1)


def test_metrics_and_losses_equal_the_published_ones():
    golden = published("metrics")
    estimate = torch.tensor(np.random.RandomState(13).standard_normal((5, 7)), dtype=torch.float32)
    estimate[:, 3:] *= torch.sign((estimate[:, 3:] * POSES[:, 3:]).sum(1, keepdim=True))
    position, orientation = pose_err(estimate, POSES)
    assert_golden(position.numpy(), golden["position_error"])
    assert_golden(orientation.numpy(), golden["orientation_error"])
    for name, s_x, s_q in (("learnable", -3.0, -6.5), ("fixed", 1.0, 10.0)):
        for norm in (1, 2):
            loss = CameraPoseLoss({"learnable": name == "learnable", "norm": norm, "s_x": s_x, "s_q": s_q})
            assert_golden(loss(estimate, POSES).detach().numpy(), golden[f"loss_{name}_norm{norm}"])
