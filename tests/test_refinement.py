"""Rotations, the solvers of test-time refinement, the learned refiner, and intervals of changes."""
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import nn
from transforms3d.quaternions import axangle2quat, quat2mat

from datasets.references import equal_poses
from models import SOLVERS, SOLVERS_WITH_NOISE
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from models.pose_refiner import PoseRefiner
from models.refinement import invert, linear_estimate, mlp_weights, optimize, simplex_weights, weighted_poses
from util.metrics import changes
from util.rotations import mean_quaternion, multiply_quaternions, quaternion_of
from util.seeds import epoch_generator

WITH_REFERENCES = [solver for solver in SOLVERS if solver != "kernel"]  # see test_latent_memory.py for kernel


@pytest.fixture
def random():
    """Return a generator per test, so that its numbers do not depend on the tests before it."""
    return np.random.default_rng(5)


def poses_near(random, n, spread=1.0, angle=0.3):
    """Return poses about the origin, rotated from a fixed orientation. spread, angle: deviations in metres, radians."""
    turns = Rotation.from_rotvec(random.normal(0, angle, (n, 3))) * Rotation.from_rotvec([0.3, -1.2, 0.5])
    quaternions = turns.as_quat(canonical=True)[:, [3, 0, 1, 2]]
    poses = np.concatenate((spread * random.standard_normal((n, 3)), quaternions), axis=1)
    return torch.tensor(poses, dtype=torch.float32)


def random_latents(random, *shape):
    return torch.tensor(random.standard_normal(shape), dtype=torch.float32)


def test_quaternions_multiply_as_rotations_compose(random):
    left, right = poses_near(random, 5)[:, 3:].double(), poses_near(random, 5, angle=2)[:, 3:].double()
    for product, a, b in zip(multiply_quaternions(left, right), left, right):
        assert quat2mat(product.numpy()) == pytest.approx(quat2mat(a.numpy()) @ quat2mat(b.numpy()), abs=1e-6)


def test_rotation_vectors_become_quaternions_at_zero_too():
    vectors = torch.tensor([[0, 0, 0], [1e-9, 0, 0], [1e-5, 2e-5, 0], [0.3, -0.2, 0.9], [0, 3, 0]], dtype=torch.float64)
    for vector, quaternion in zip(vectors.numpy(), quaternion_of(vectors).numpy()):
        angle = np.linalg.norm(vector)
        expected = axangle2quat(vector, angle) if angle else [1, 0, 0, 0]
        assert quaternion == pytest.approx(expected, abs=1e-12)
    for at in vectors:
        vector = at.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda v: quaternion_of(v[None]), (vector,), eps=1e-7, atol=1e-5)


def test_the_mean_quaternion_is_the_mean_rotation_for_either_sign(random):
    quaternions = poses_near(random, 9, angle=0.4)[:, 3:].double()
    weights = torch.tensor(random.random(9))
    expected = Rotation.from_quat(quaternions.numpy()[:, [1, 2, 3, 0]]).mean(weights.numpy()).as_quat()[[3, 0, 1, 2]]
    flipped = torch.where(torch.arange(9).unsqueeze(1) % 2 == 0, quaternions, -quaternions)
    assert abs(mean_quaternion(flipped, weights).numpy() @ expected) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("k, refine_orientation", [(3, None), (1, "affine"), (4, "affine"), (4, "eigen")])
def test_weighted_poses(k, refine_orientation, random):
    references = torch.stack([poses_near(random, k) for _ in range(5)])
    one_sided = references[:, :, 3:].double().numpy().copy()
    references[:, 1:2, 3:] *= -1
    weights, poses = random_latents(random, 5, k).softmax(dim=1), poses_near(random, 5)
    for i, pose in enumerate(weighted_poses(weights, references, poses, refine_orientation)):
        assert pose[:3].numpy() == pytest.approx(weights[i].numpy() @ references[i, :, :3].numpy(), abs=1e-5)
        if refine_orientation is None:
            expected = poses[i, 3:].numpy()
        elif refine_orientation == "affine":
            total = weights[i].double().numpy() @ one_sided[i]
            expected = total / np.linalg.norm(total)
        else:
            mean = Rotation.from_quat(references[i][:, [4, 5, 6, 3]].numpy()).mean(weights[i].numpy())
            expected = mean.as_quat()[[3, 0, 1, 2]]
        assert abs(pose[3:].numpy() @ expected) == pytest.approx(1, abs=1e-6)


def slsqp_minimum(encoded, latents, scale):
    """Return the least squared distance of weighted encodings k x D from latents D, divided by `scale`, by SLSQP."""
    k = len(encoded)
    return minimize(lambda v: np.square(v @ encoded - latents).sum() / scale, np.full(k, 1 / k), method="SLSQP",
                    bounds=[(0, 1)] * k, constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
                    options={"ftol": 1e-14, "maxiter": 500}).fun


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_simplex_weights_are_the_minimum_that_an_independent_solver_finds(k, random):
    encoded, latents = random_latents(random, 12, k, 20) + 2, random_latents(random, 12, 20) + 2
    encoded[0, :] = encoded[0, :1]  # identical references
    latents[1] = encoded[1, -1]  # the answer is a reference
    latents[2] = encoded[2].mean(dim=0)
    encoded[3:5] *= 1e4
    latents[5:7] *= 1e-4
    weights = simplex_weights(encoded, latents)
    assert (weights >= 0).all() and torch.allclose(weights.sum(dim=1), torch.ones(12), atol=1e-6)
    weights = (weights.double() / weights.double().sum(dim=1, keepdim=True)).numpy()
    for w, f, z in zip(weights, encoded.double().numpy(), latents.double().numpy()):
        scale = max(np.square(f - z).sum(axis=1).max(), 1e-30)
        assert np.square(w @ f - z).sum() / scale <= slsqp_minimum(f, z, scale) + 1e-9
    assert weights[1, -1] == pytest.approx(1, abs=1e-5)
    assert weights[2] == pytest.approx(np.full(k, 1 / k), abs=1e-4)


def test_mlp_weights_are_those_of_one_network_per_query(random):
    n, k, dim = 70, 3, 8  # more than one chunk
    encoded, latents = random_latents(random, n, k, dim), random_latents(random, n, dim)
    weights = mlp_weights(encoded, latents, list(range(n)), 7, 3)
    for row in (0, 1, 69):
        layers = [nn.Linear(i, o) for i, o in ((k * dim, 64 * k), (64 * k, 32 * k), (32 * k, 16 * k), (16 * k, k))]
        generator = epoch_generator(7, row)
        for layer in layers:
            drawn = torch.empty(layer.weight.T.shape)
            bound = (6 / sum(drawn.shape)) ** 0.5
            layer.weight.data = drawn.uniform_(-bound, bound, generator=generator).T.contiguous()
            layer.bias.data.zero_()
        network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3],
                                nn.Softmax(dim=0))
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(3):
            loss = (network(encoded[row].flatten()) @ encoded[row] - latents[row]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = network(encoded[row].flatten())
        assert torch.allclose(weights[row], expected, atol=1e-4)
        alone = mlp_weights(encoded[row:row + 1], latents[row:row + 1], [row], 7, 3)[0]
        assert torch.allclose(alone, weights[row], atol=1e-5)
    assert torch.equal(mlp_weights(encoded, latents, list(range(n)), 7, 3), weights)
    assert not torch.equal(mlp_weights(encoded, latents, list(range(n)), 8, 3), weights)


def test_the_linear_estimate_is_the_gaussian_posterior_mean(random):
    references = poses_near(random, 400)
    answers, a = poses_near(random, 6), random.standard_normal((30, 7))
    root = random.standard_normal((30, 30)) / 8
    noise = root @ root.T + 0.01 * np.eye(30)
    encoded = torch.tensor(references.double().numpy() @ a.T, dtype=torch.float32)
    latents = torch.tensor(answers.double().numpy() @ a.T, dtype=torch.float32) + 0.1 * random_latents(random, 6, 30)
    flipped = references.clone()
    flipped[::3, 3:] *= -1  # the same rotations
    estimates = linear_estimate(latents, flipped, encoded, torch.tensor(noise, dtype=torch.float32))
    # The information form of the posterior. A hundredth of the latents' mean variance is added to the noise.
    p = references.double().numpy()
    covariance = np.cov(p.T, bias=True)
    noise = noise + 0.01 * np.diag(a @ covariance @ a.T + noise).mean() * np.eye(30)
    posterior = np.linalg.inv(np.linalg.inv(covariance) + a.T @ np.linalg.inv(noise) @ a)
    expected = p.mean(axis=0) + (latents.double().numpy() - p.mean(axis=0) @ a.T) @ np.linalg.inv(noise) @ a @ posterior
    expected[:, 3:] /= np.linalg.norm(expected[:, 3:], axis=1, keepdims=True)
    sign = np.sign((estimates[:, 3:].numpy() * expected[:, 3:]).sum(axis=1, keepdims=True))
    assert estimates[:, :3].numpy() == pytest.approx(expected[:, :3], abs=1e-3)
    assert sign * estimates[:, 3:].numpy() == pytest.approx(expected[:, 3:], abs=1e-3)


@pytest.fixture
def encoder(random):
    torch.manual_seed(3)
    encoder = PoseEncoder(64, octaves=2)
    encoder.fit_poses(30 * poses_near(random, 200), torch.zeros(200, dtype=torch.long))
    return encoder.requires_grad_(False)


def test_inversion_finds_the_pose_that_the_latents_encode(encoder, random):
    references, steps = poses_near(random, 500, spread=30), random_latents(random, 40, 6)
    answers = references[:40].clone()
    answers[:, :3] += steps[:, :3]  # metres, in a scene of about 30 m
    answers[:, 3:] = multiply_quaternions(quaternion_of(0.03 * steps[:, 3:]), answers[:, 3:])
    noise = torch.eye(128) + 0.5
    latents, encoded = (torch.cat(encoder(poses), dim=1) for poses in (answers, references))
    found = invert(encoder, latents, torch.tensor(0), references, encoded, noise)
    assert (found[:, :3] - answers[:, :3]).norm(dim=1).quantile(0.9) < 0.01
    assert (found[:, 3:] * answers[:, 3:]).sum(dim=1).abs().quantile(0.1) > 1 - 1e-6


def test_inversion_descends_the_whitened_distance(encoder, random):
    references, latents = poses_near(random, 50, spread=30), random_latents(random, 20, 128)
    root = random_latents(random, 128, 128) / 11
    noise = root @ root.T
    encoded = torch.cat(encoder(references), dim=1)
    found = invert(encoder, latents, torch.tensor(0), references, encoded, noise)
    inverse = torch.linalg.inv(noise + 0.1 * noise.diagonal().mean() * torch.eye(128))

    def distances(codes):
        difference = codes - latents
        return torch.einsum("nd,de,ne->n", difference, inverse, difference)

    nearest = torch.stack([distances(code.expand(20, -1)) for code in encoded], dim=1).amin(dim=1)
    assert (distances(torch.cat(encoder(found), dim=1)) < nearest * (1 + 1e-4)).all()
    assert (found[:, 3:].norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("solver", WITH_REFERENCES)
def test_scenes_are_refined_separately_and_keep_the_aprs_pose_without_references(solver, random):
    torch.manual_seed(0)
    encoder = MultiScenePoseEncoder(8, num_scenes=3).requires_grad_(False)
    references = poses_near(random, 100)
    scenes = torch.tensor([0, -1] * 10 + [2] * 80)
    references[scenes == 2, :3] *= 30
    encoder.fit_poses(references, scenes.clamp(min=0))
    encoder.fit_latents({"truth": references, "pose": references, "scene": scenes.clamp(min=0),
                         "latents": random_latents(random, 100, 16)})
    queries = {"pose": 2 * poses_near(random, 6), "latents": random_latents(random, 6, 16),
               "scene": torch.tensor([0, 1, 2, 2, 0, 1])}
    poses, refined = optimize(solver, encoder, queries, references, scenes, {})
    enough = (queries["scene"] == 2) if solver in SOLVERS_WITH_NOISE else (queries["scene"] != 1)  # scene 0 has 10
    assert torch.equal(refined, enough)
    norms = queries["pose"][:, 3:].norm(dim=1, keepdim=True)
    unit = queries["pose"] / torch.cat((torch.ones(6, 3), norms.expand(6, 4)), dim=1)
    assert torch.allclose(poses[~refined], unit[~refined], atol=1e-6)
    if solver in ("linear", "inversion"):
        of_scene = references[scenes == 2]
        encoded = torch.cat(encoder(of_scene, torch.full((80,), 2)), dim=1)
        more = (of_scene, encoded, encoder.noise)
        latents = queries["latents"][2:4]
        expected = (linear_estimate(latents, *more) if solver == "linear" else
                    invert(encoder, latents, torch.tensor(2), *more))
        assert torch.allclose(poses[2:4], expected, atol=1e-5)
        assert not torch.allclose(linear_estimate(latents, of_scene, encoded, torch.eye(16)), expected, atol=1e-2)
    unknown = {key: value[:2] for key, value in queries.items()} | {"scene": torch.tensor([1, 1])}
    kept, refined = optimize(solver, encoder, unknown, references, scenes, {})
    assert not refined.any() and torch.allclose(kept, unit[:2], atol=1e-6)
    # A scene alone and a query alone give the same. The query's row determines the initial weights of mlp.
    alone, _ = optimize(solver, encoder, queries, references[scenes == 2], torch.full((80,), 2), {})
    assert torch.allclose(alone[2:4], poses[2:4], atol=1e-5)
    first = {key: value[:1] for key, value in queries.items()}
    assert torch.allclose(optimize(solver, encoder, first, references, scenes, {})[0], poses[:1], atol=1e-5)


@pytest.mark.parametrize("solver", WITH_REFERENCES)
def test_identical_references_give_their_position(solver, encoder, random):
    references = poses_near(random, 1).expand(40, 7)
    queries = {"pose": poses_near(random, 3), "latents": random_latents(random, 3, 128),
               "scene": torch.zeros(3, dtype=torch.long)}
    reference_scenes = torch.zeros(40, dtype=torch.long)
    poses, refined = optimize(solver, encoder, queries, references, reference_scenes, {"num_neighbors": 5})
    assert refined.all() and torch.isfinite(poses).all()
    if solver != "inversion":  # inversion moves to where the encoding fits better
        assert torch.allclose(poses[:, :3], references[:3, :3], atol=1e-4)


@pytest.mark.parametrize("multi_scene", [False, True])
@pytest.mark.parametrize("solver", ["mlp", "simplex"])
def test_a_published_paes_references_take_the_sign_of_the_aprs_estimates(random, solver, multi_scene):
    torch.manual_seed(0)
    encoder = (MultiScenePoseEncoder(8, num_scenes=2) if multi_scene else PoseEncoder(8)).requires_grad_(False)
    encoder._version = 1
    references = poses_near(random, 60)
    queries = {"pose": 3 * poses_near(random, 8), "latents": random_latents(random, 8, 16),
               "scene": torch.arange(8) % (1 + multi_scene)}
    scenes = torch.arange(60) % (1 + multi_scene)
    flipped, negated = references.clone(), references.clone()
    flipped[::2, 3:] *= -1
    negated[:, 3:] *= -1
    expected, _ = optimize(solver, encoder, queries, references, scenes, {})
    for same in (flipped, negated):
        assert torch.allclose(optimize(solver, encoder, queries, same, scenes, {})[0], expected, atol=1e-6)
    # The sign is each query's own: with the other sign of its estimate, the encodings differ, and so does the pose.
    other_side = {**queries, "pose": queries["pose"] * torch.tensor([1, 1, 1, -1, -1, -1, -1.0])}
    differing, _ = optimize(solver, encoder, other_side, references, scenes, {})
    assert not torch.allclose(differing[:, :3], expected[:, :3], atol=1e-3)
    alone = optimize(solver, encoder, {key: value[:1] for key, value in queries.items()}, references, scenes, {})[0]
    assert torch.allclose(alone, expected[:1], atol=1e-5)


def test_a_pae_takes_positions_in_its_scenes_units_and_quaternions_of_either_sign(random):
    torch.manual_seed(0)
    poses = torch.cat((poses_near(random, 50), poses_near(random, 50)))
    scenes = torch.arange(2).repeat_interleave(50)
    encoder, other = MultiScenePoseEncoder(8, num_scenes=2), MultiScenePoseEncoder(8, num_scenes=2)
    other.load_state_dict(encoder.state_dict())
    moved = poses.clone()
    moved[:50, :3] = 20 * moved[:50, :3] + torch.tensor([100.0, -300, 5])  # a scene outdoors
    moved[50:60, 3:] *= -3
    for pae, training_poses in ((encoder, poses), (other, moved)):
        pae.fit_poses(training_poses, scenes)
    for a, b in zip(encoder(poses, scenes), other(moved, scenes)):
        assert torch.allclose(a, b, atol=1e-3)
    latents = random_latents(random, 100, 16)
    encoder.fit_latents({"truth": poses, "pose": poses, "scene": scenes, "latents": latents})
    residuals = (latents - torch.cat(encoder(poses, scenes), dim=1)).detach().numpy()
    assert encoder.noise.numpy() == pytest.approx(sum(np.outer(r, r) for r in residuals) / 100, abs=1e-5)


def test_a_refiner_starts_at_the_aprs_pose_and_rotates_it(random):
    torch.manual_seed(0)
    refiner = PoseRefiner(4).eval()
    pose, latents = 3 * poses_near(random, 5), random_latents(random, 5, 8)
    unit = torch.nn.functional.normalize(pose[:, 3:], dim=1)
    assert torch.allclose(refiner(latents, pose), torch.cat((pose[:, :3], unit), dim=1), atol=1e-6)
    turn = torch.tensor(axangle2quat([1, 2, 3], 0.7), dtype=torch.float32)
    refiner.q_reg.bias.data, refiner.x_reg.bias.data = 5 * turn, torch.tensor([1.0, 2.0, 3.0])
    for after, before in zip(refiner(latents, pose).detach().numpy(), pose.numpy()):
        assert quat2mat(after[3:]) == pytest.approx(quat2mat(turn.numpy()) @ quat2mat(before[3:]), abs=1e-5)
        assert after[:3] - before[:3] == pytest.approx([1, 2, 3], abs=1e-5)
    # The output does not depend on the units of the latents.
    refiner.hidden[0].weight.data.normal_()
    refiner.x_reg.weight.data.normal_()
    refiner.fit_inputs(latents, pose, pose)
    before = refiner(latents, pose)
    refiner.fit_inputs(100 * latents + 7, pose, pose)
    assert torch.allclose(refiner(100 * latents + 7, pose), before, atol=1e-3)


def test_equal_poses_are_found_by_value_alone(random):
    poses = poses_near(random, 30).double().numpy()
    others = poses[10:20].copy()
    others[:5, 3:] *= -1
    others[5, 0] += 5e-5
    others[6, 0] += 5e-4
    others[7, 3:] *= 4  # not unit, the same rotation
    expected = np.zeros(30, bool)
    expected[[10, 11, 12, 13, 14, 15, 17, 18, 19]] = True
    assert (equal_poses(poses, others) == expected).all()
    far = poses + [150, -150, 20, 0, 0, 0, 0]
    assert equal_poses(far, far.astype(np.float32)).all() and equal_poses(far, far.round(5)).all()


def test_the_interval_of_a_change_has_its_nominal_coverage():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        # Errors of neighbouring frames are correlated: they share a factor for 25 frames. The true change is -20 %.
        shared = np.repeat(random.lognormal(0, 0.5, 40), 25)
        before = shared * random.lognormal(0, 0.3, 1000)
        after = 0.8 * shared * random.lognormal(0, 0.3, 1000)
        (change, low, high), (none, *zero) = changes((before, before), (after, before), n_samples=300)
        assert low <= change <= high and none == 0 and zero == [0, 0]
        inside += low <= -20 <= high
    assert 52 <= inside <= 60
    halved = changes((before, before), (before / 2, before / 2), n_samples=50)
    assert np.allclose(halved, -50)
    assert np.isnan(changes((before[:25], before[:25]), (after[:25], after[:25]))[0][1:]).all()
