"""Pose errors, pose losses and nearest references, against closed forms and an independent library."""
import math

import numpy as np
import pytest
import torch
from transforms3d.quaternions import axangle2quat, qmult

from models.refinement import nearest_references, pose_distances
from util.losses import CameraPoseLoss
from util.metrics import pose_err


@pytest.fixture
def random():
    """Return a generator per test, so that its numbers do not depend on the tests before it."""
    return np.random.default_rng(0)


def random_poses(random, n):
    return torch.tensor(random.standard_normal((n, 7)), dtype=torch.float32)


def test_orientation_error_is_the_angle_of_the_rotation_between(random):
    angles = [0.0, 1e-4, 0.5, 10.0, 90.0, 179.0]
    truth = random_poses(random, len(angles))
    estimate = truth.clone()
    for i, angle in enumerate(angles):
        turn = axangle2quat(random.standard_normal(3), math.radians(angle))
        estimate[i, 3:] = torch.tensor(-3.7 * qmult(truth[i, 3:].double().numpy(), turn))  # any sign, any norm
        estimate[i, :3] += torch.tensor([2.0, 3.0, 6.0])
    position, orientation = pose_err(estimate, truth)
    assert orientation.numpy() == pytest.approx(angles, abs=2e-5)
    assert position.numpy() == pytest.approx(7.0, abs=1e-5)


def test_a_perfect_estimate_has_no_error(random):
    truth = random_poses(random, 1000)
    position, orientation = pose_err(truth, truth)
    assert position.max() == 0 and orientation.max() == 0
    assert pose_err(torch.cat((truth[:, :3], -truth[:, 3:]), dim=1), truth)[1].max() == 0


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("learnable", [True, False])
def test_the_loss_takes_the_nearer_sign_and_any_norm_of_the_quaternion(norm, learnable, random):
    loss = CameraPoseLoss({"learnable": learnable, "norm": norm, "s_x": -1.0, "s_q": 2.0})
    estimate, truth = random_poses(random, 6), random_poses(random, 6)
    value = loss(estimate, truth)
    flipped = torch.cat((truth[:, :3], -2 * truth[:, 3:]), dim=1)
    l_x, l_q = [], []
    for est, gt in zip(estimate.double().numpy(), truth.double().numpy()):
        q, p = est[3:] / np.linalg.norm(est[3:]), gt[3:] / np.linalg.norm(gt[3:])
        l_x.append(np.linalg.norm(est[:3] - gt[:3], ord=norm))
        l_q.append(np.linalg.norm(q - p if q @ p > 0 else q + p, ord=norm))
    l_x, l_q = np.mean(l_x), np.mean(l_q)
    terms = [l_x * math.exp(1), -1, l_q * math.exp(-2), 2] if learnable else [-l_x, 2 * l_q]
    close = 1e-6 * np.abs(terms).sum()  # relative to the terms, since their sum can be near 0
    assert value.item() == pytest.approx(sum(terms), rel=0, abs=close)
    assert loss(estimate, flipped).item() == pytest.approx(value.item(), rel=0, abs=close)
    assert [parameter.requires_grad for parameter in loss.parameters()] == [learnable] * 2


def test_a_perfect_estimate_has_a_finite_gradient(random):
    truth = random_poses(random, 4)
    estimate = truth.clone().requires_grad_()
    CameraPoseLoss({"learnable": True, "norm": 2, "s_x": 0, "s_q": 0})(estimate, truth).backward()
    assert torch.isfinite(estimate.grad).all()


def test_the_nearest_references_are_those_of_the_definition(random):
    poses, references = random_poses(random, 40), random_poses(random, 90)
    scenes, reference_scenes = torch.tensor(random.integers(0, 3, 40)), torch.tensor(random.integers(0, 2, 90))
    nearest = nearest_references(poses, scenes, references, reference_scenes, k=4)
    for pose, scene, rows in zip(poses.double().numpy(), scenes, nearest):
        candidates = np.flatnonzero(reference_scenes == scene)
        if len(candidates) == 0:
            assert rows.tolist() == [-1] * 4
            continue
        d_x, d_q = [], []
        for reference in references.double().numpy()[candidates]:
            q, p = (v[3:] / np.linalg.norm(v[3:]) for v in (pose, reference))
            d_x.append(np.linalg.norm(pose[:3] - reference[:3]))
            d_q.append(min(np.linalg.norm(q - p), np.linalg.norm(q + p)))
        order = np.argsort(np.array(d_x) / max(d_x) + np.array(d_q) / max(d_q))
        assert rows.tolist() == candidates[order[:4]].tolist()


def test_few_references_repeat(random):
    poses, scenes = random_poses(random, 9), torch.tensor([0] * 6 + [1] * 2 + [2])
    nearest = nearest_references(poses, scenes, poses[:8], scenes[:8], k=3)
    assert nearest[6:].tolist() == [[6, 7, 6], [7, 6, 7], [-1, -1, -1]]
    assert torch.isfinite(pose_distances(poses, poses[:1].expand(3, -1))).all()
