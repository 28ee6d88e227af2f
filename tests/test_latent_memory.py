"""A PAE's memory: novelty, corrections and expected errors, on APRs whose errors are known functions."""
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from models.checkpoints import fill
from models.latent_memory import _LENGTH, _RIDGE, N_FRAMES, whitening
from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
from util.errors import UserError
from util.metrics import ause, ause_of_chance, kept_errors, pose_err

LATENTS = 16  # two of 8


def frames(n, seed=0, error=0.0, noise=0.02, shift=0.0, mixing_seed=0):
    """Frames along a walk whose latents are smooth functions of the true pose, plus noise.

    The APR's position is off by `error` metres times a smooth function of the pose. shift: metres along x, away from
    the walk of shift 0.
    """
    random, mixing = np.random.default_rng(seed), np.random.default_rng(mixing_seed)
    t = np.sort(random.uniform(0, 10, n))
    positions = np.stack((t + shift, np.sin(t), 0.3 * np.cos(2 * t)), axis=1)
    turns = Rotation.from_euler("zyx", np.stack((0.8 * np.sin(t), 0.2 * np.cos(t), 0 * t), axis=1))
    truth = np.concatenate((positions, turns.as_quat()[:, [3, 0, 1, 2]]), axis=1)
    known = np.stack((positions[:, 0] / 3, *positions[:, 1:].T, turns.as_rotvec()[:, 2]), axis=1)
    latents = np.tanh(known @ mixing.normal(0, 1, (4, LATENTS))) + noise * random.standard_normal((n, LATENTS))
    estimates = truth + error * np.pad(np.stack((np.sin(t), np.cos(t), np.sin(2 * t)), axis=1), ((0, 0), (0, 4)))
    truth, latents, estimates = (torch.tensor(values, dtype=torch.float32) for values in (truth, latents, estimates))
    return {"truth": truth, "pose": estimates, "latents": latents, "scene": torch.zeros(n, dtype=torch.long)}


def joined(*parts):
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.fixture
def encoder():
    """A PAE that knows nothing: its encodings do not depend on the pose, so that noise is the latents' covariance."""
    torch.manual_seed(0)
    pae = PoseEncoder(LATENTS // 2).requires_grad_(False)
    for parameter in pae.parameters():
        parameter.zero_()
    return pae


def test_corrections_are_kernel_ridge_regression(encoder):
    training, queries = frames(60, error=0.3), frames(20, seed=1, error=0.3)
    encoder.fit_latents(training)
    memory = encoder.memory
    memory.trust[:, :, 1:] = 1
    memory.trust[:, -1, 0] = 1e6
    whiten = whitening(encoder.noise).double().numpy()
    assert np.allclose(whiten @ whiten.T, np.linalg.inv(
        encoder.noise.numpy() + 0.1 * encoder.noise.diagonal().mean().item() * np.eye(LATENTS)), rtol=1e-3)
    known, asked = (part["latents"].double().numpy() @ whiten for part in (training, queries))
    length = _LENGTH * np.median(cdist(known, known))
    errors = (training["truth"] - training["pose"])[:, :3].double().numpy()
    weights = np.linalg.solve(np.exp(-cdist(known, known, "sqeuclidean") / (2 * length ** 2)) + _RIDGE * np.eye(60),
                              errors)
    expected = np.exp(-cdist(asked, known, "sqeuclidean") / (2 * length ** 2)) @ weights
    poses, refined = memory.corrected(encoder, queries)
    assert refined.all()
    assert (poses - queries["pose"])[:, :3].numpy() == pytest.approx(expected, abs=2e-3)


def test_errors_that_the_latents_tell_are_corrected_and_others_are_left(encoder):
    learnable, queries = frames(400, error=0.3), frames(200, seed=1, error=0.3)
    encoder.fit_latents(learnable)
    poses, _ = encoder.memory.corrected(encoder, queries)
    before, after = (pose_err(p, queries["truth"])[0].median() for p in (queries["pose"], poses))
    assert after < 0.4 * before
    # Errors that have nothing to do with the latents, of training frames and queries.
    random = torch.Generator().manual_seed(0)
    for part in (learnable, queries):
        part["pose"] = part["truth"].clone()
        part["pose"][:, :3] += 0.3 * torch.randn(len(part["pose"]), 3, generator=random)
    encoder.fit_latents(learnable)
    poses, _ = encoder.memory.corrected(encoder, queries)
    before, after = (pose_err(p, queries["truth"])[0].median() for p in (queries["pose"], poses))
    assert after < 1.05 * before
    # Where no training frame was, nothing is known.
    far = frames(50, seed=2, shift=60)
    far["latents"] = far["latents"] + 10
    poses, refined = encoder.memory.corrected(encoder, far)
    assert refined.all() and torch.allclose(poses, far["pose"], atol=1e-5)


def test_orientations_are_corrected_for_either_sign(encoder):
    training, queries = frames(300), frames(100, seed=1)
    turn = Rotation.from_rotvec([0, 0, 0.2])
    for part in (training, queries):  # the APR's orientations are all off by the same turn
        turned = (Rotation.from_quat(part["truth"][:, [4, 5, 6, 3]]) * turn).as_quat()[:, [3, 0, 1, 2]]
        part["pose"] = torch.cat((part["truth"][:, :3], torch.tensor(turned, dtype=torch.float32)), dim=1)
    training["truth"][::2, 3:] *= -1
    training["pose"][::3, 3:] *= -2
    queries["pose"][::2, 3:] *= -3
    encoder.fit_latents(training)
    errors = pose_err(encoder.memory.corrected(encoder, queries)[0], queries["truth"])[1]
    assert errors.median() < 3 < 11.4 < pose_err(queries["pose"], queries["truth"])[1].median()


def test_novelty_is_about_1_for_frames_like_the_training_ones_and_large_elsewhere(encoder):
    training, like = frames(500, error=0.1), frames(200, seed=1, error=0.1)
    encoder.fit_latents({key: rows[(training["truth"][:, 0] - 5).abs() > 0.5] for key, rows in training.items()})
    left_out = (like["truth"][:, 0] - 5).abs() < 0.5  # a tenth of the walk, as in the folds
    novelty = encoder.memory.novelty(encoder, like)
    assert 0.3 < novelty[left_out].median() < 3 and novelty.median() < 1
    elsewhere = frames(200, seed=2, shift=60, mixing_seed=1)
    assert encoder.memory.novelty(encoder, elsewhere).median() > 10 * novelty.median()
    # The pose matters, too: a pose at the wrong end of the walk does not fit the latents.
    wrong = {**like, "pose": like["pose"].flip(0)}
    far_off = pose_err(wrong["pose"], wrong["truth"])[0] > 1
    assert (encoder.memory.novelty(encoder, wrong) > 3 * novelty)[far_off].float().mean() > 0.95
    # Quaternions of any norm and sign are the same pose.
    scaled = {**like, "pose": like["pose"] * torch.tensor([1, 1, 1, -3, -3, -3, -3])}
    assert torch.allclose(encoder.memory.novelty(encoder, scaled), novelty, atol=1e-2)


def test_scenes_have_memories_of_their_own_and_a_small_one_has_none():
    torch.manual_seed(0)
    encoder = MultiScenePoseEncoder(LATENTS // 2, num_scenes=3).requires_grad_(False)
    first, second, few = frames(300, error=0.3), frames(300, seed=1, error=0.3, mixing_seed=1), frames(20, seed=2)
    second["scene"] += 2
    few["scene"] += 1
    mixed = joined(first, few, second)
    encoder.fit_latents(mixed)
    memory = encoder.memory
    assert memory.scenes.tolist() == [0] * N_FRAMES + [2] * N_FRAMES
    queries = joined(frames(30, seed=3, error=0.3), {**frames(10, seed=4), "scene": torch.ones(10, dtype=torch.long)})
    poses, refined = memory.corrected(encoder, queries)
    novelty = memory.novelty(encoder, queries)
    assert refined.tolist() == [True] * 30 + [False] * 10 == torch.isfinite(novelty).tolist()
    assert torch.allclose(poses[30:], queries["pose"][30:])
    alone = MultiScenePoseEncoder(LATENTS // 2, num_scenes=3).requires_grad_(False)
    alone.load_state_dict({key: value for key, value in encoder.state_dict().items() if "memory" not in key}
                          | {key: value for key, value in alone.state_dict().items() if "memory" in key})
    alone.memory.fit(alone, first)
    assert torch.allclose(alone.memory.novelty(alone, queries)[:30], novelty[:30], rtol=1e-3)
    assert torch.allclose(alone.memory.corrected(alone, queries)[0], poses, atol=1e-4)


def test_expected_errors_agree_with_true_ones_and_end_at_a_guess(encoder):
    encoder.fit_latents(frames(500, error=0.1, noise=0.3))
    validation, test = frames(400, seed=1, error=0.5, noise=0.6), frames(400, seed=2, error=0.5, noise=0.6)
    encoder.memory.calibrate(encoder, validation)
    novelty = encoder.memory.novelty(encoder, test)
    expected = encoder.memory.expected_errors(novelty)
    corrected, _ = encoder.memory.corrected(encoder, test)
    true = [*pose_err(test["pose"], test["truth"]), *pose_err(corrected, test["truth"])]
    usual = novelty < novelty.quantile(0.9)
    for k, error in enumerate(true):
        order = expected[:, k].argsort()
        assert (expected[novelty.argsort(), k].diff() >= -1e-6).all()
        if k in (0, 2):
            assert expected[usual, k].mean().item() == pytest.approx(error[usual].mean().item(), rel=0.2)
            assert expected[order[-80:], k].mean() >= expected[order[:80], k].mean()
    far = encoder.memory.expected_errors(torch.tensor([1e6, torch.nan]))
    positions = encoder.memory.poses[:, :3].numpy()
    guess = cdist(positions, positions)[np.triu_indices(len(positions), 1)].mean()
    assert far[0].tolist() == pytest.approx([guess, 90, guess, 90], rel=1e-4) and far[1].isnan().all()


def test_a_file_keeps_the_memory_and_earlier_files_have_none(encoder, tmp_path):
    encoder.fit_latents(frames(100, error=0.1))
    encoder.memory.calibrate(encoder, frames(100, seed=1, error=0.1))
    weights, queries = encoder.state_dict(), frames(10, seed=2)
    again = PoseEncoder(LATENTS // 2).requires_grad_(False)
    fill("pae.pth", again, weights)
    assert torch.equal(again.memory.novelty(again, queries), encoder.memory.novelty(encoder, queries))
    assert torch.equal(again.memory.corrected(again, queries)[0], encoder.memory.corrected(encoder, queries)[0])
    novelty = torch.tensor([0.5, 2])
    assert torch.equal(again.memory.expected_errors(novelty), encoder.memory.expected_errors(novelty))
    earlier = PoseEncoder(LATENTS // 2)
    fill("pae.pth", earlier, {key: value for key, value in weights.items() if not key.startswith("memory.")})
    assert len(earlier.memory) == 0
    latents, poses = weights["memory.latents"], weights["memory.poses"]
    for key, tensor, words in (("memory.poses", poses[1:], "memory.poses has 99 frames"),
                               ("memory.latents", latents[:, 1:], "size mismatch for memory.latents")):
        with pytest.raises(UserError, match=f"^pae.pth: does not fit the model: .*{words}"):
            fill("pae.pth", PoseEncoder(LATENTS // 2), {**weights, key: tensor})


def test_outliers_are_not_remembered(encoder, caplog):
    training = frames(300, error=0.1)
    encoder.fit_latents(training)
    kept = encoder.memory.poses.clone()
    training["truth"][150, :3] += 4000
    with caplog.at_level("INFO"):
        encoder.fit_latents(training)
    assert "1 of 300 frames" in caplog.text
    assert encoder.memory.poses[:, :3].abs().max() == kept[:, :3].abs().max()


def test_sparsification_is_that_of_a_count_by_hand():
    errors = np.array([1.0, 2, 3, 6])
    assert kept_errors(errors, errors).tolist() == [1, 1.5, 2, 3]
    assert kept_errors(errors, -errors).tolist() == [6, 4.5, 11 / 3, 3]
    assert ause(errors, errors) == 0
    assert ause(errors, -errors) == pytest.approx((5 + 3 + 5 / 3 + 0) / 4 / 3)
    assert ause_of_chance(errors) == pytest.approx((2 + 1.5 + 1 + 0) / 4 / 3)
    random = np.random.default_rng(0)
    many = random.lognormal(size=20000)
    assert ause(many, random.random(20000)) == pytest.approx(ause_of_chance(many), abs=0.02)
