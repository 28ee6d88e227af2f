"""Poses along a walk: a Kalman filter, the Rauch-Tung-Striebel (RTS) smoother, and the noise that both assume.

The camera moves with constant velocity and turns with constant angular velocity; white acceleration disturbs both. (A
random walk of the orientation lags behind a camera that turns, and gained less on real and rendered frames.) The
orientation has an error state: a rotation vector in the world's axes, to the first order (exact where nothing turns).
All axes share their noise, so a 2 x 2 covariance of value and velocity serves the three of the position, and another
one the three of the orientation. In shapes, 2 stands for (position, orientation), in units of length and in radians.
"""
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation
from scipy.stats import chi2, f

from util.progress import progress

FREEDOM = 4  # degrees of freedom of the t distribution of innovations: large errors are more frequent than normal
GATE = 6 * f.ppf(0.99, 6, FREEDOM)  # of the squared Mahalanobis distance of a frame's pose from the predicted one
PATIENCE = 5  # frames beyond the gate, one after the other, that start a new track
MEDIAN = chi2.median(3)  # of the squared norm of three standard normal numbers
FASTEST = 10  # times the typical velocity: the standard deviation of the velocity where a track starts


class Step(NamedTuple):
    """The filter after a frame, under G settings: the estimate, and what was predicted before the frame's pose."""

    pose: np.ndarray  # G x 7
    velocity: np.ndarray  # G x 2 x 3
    covariance: np.ndarray  # G x 2 x 2 x 2: of value and velocity
    predicted: tuple  # the same three, before
    elapsed: float  # since the frame before
    used: np.ndarray  # G: whether the frame's pose is within the gate, or starts a track
    started: np.ndarray  # G: whether a track starts here
    log_density: np.ndarray  # G x 2, of the innovation; 0 where a track starts or the frame has no pose


def difference(poses, others):
    """Return what leads from `others` to `poses`: ... x 7, ... x 7 -> ... x 2 x 3, the second a rotation vector."""
    turn = _rotations(poses) * _rotations(others).inv()
    return np.stack((poses[..., :3] - others[..., :3], turn.as_rotvec()), axis=-2)


def moved(poses, by):
    """Return poses moved and turned by a `difference`: N x 7, N x 2 x 3 -> N x 7."""
    turned = Rotation.from_rotvec(by[:, 1]) * _rotations(poses)
    return np.hstack((poses[:, :3] + by[:, 0], np.roll(turned.as_quat(), 1, axis=-1)))


def filter_steps(poses, times, variances, accelerations, speeds, breaks=()):
    """Yield the Step of a Kalman filter at each of N frames, under G settings.

    poses: N x 7, NaN where a frame has none; the first has one. times: N, rising. variances: G x N x 2, of the noise
    of the poses along an axis. accelerations: G x 2, spectral densities. speeds: 2, standard deviations of the
    velocity at the start. breaks: frames with a pose at which a new track starts.

    Without a pose, or with one beyond the gate, a frame keeps the predicted pose. A new track also starts where
    PATIENCE poses in a row are beyond the gate.
    """
    n = len(variances)
    known, misses, young = np.isfinite(poses).all(axis=1), np.zeros(n, int), np.ones(n, bool)
    pose, velocity, covariance = np.tile(poses[0], (n, 1)), np.zeros((n, 2, 3)), np.zeros((n, 2, 2, 2))
    for k, measured in enumerate(progress(poses, desc="frames", leave=False, delay=5)):
        elapsed = times[k] - times[max(k - 1, 0)]
        predicted = pose, velocity, covariance = _predict(pose, velocity, covariance, elapsed, accelerations)
        innovation = difference(np.broadcast_to(measured, pose.shape), pose) if known[k] else np.zeros((1, 2, 3))
        spread = covariance[..., 0, 0] + variances[:, k]
        squared = np.square(innovation).sum(axis=-1) / spread
        within = squared.sum(axis=-1) <= GATE
        misses = np.where(within, 0, misses + 1) if known[k] else misses
        started = (misses >= PATIENCE) | (k == 0) | (k in breaks)
        used = known[k] & (within | started)

        gain = covariance[..., 0] / spread[..., None] * (used & ~started)[:, None, None]
        pose = moved(pose, gain[..., :1] * innovation)
        velocity = velocity + gain[..., 1:] * innovation
        covariance = covariance - gain[..., None] * covariance[..., None, 0, :]
        if started.any():
            pose[started], velocity[started], misses[started] = measured, 0, 0
            covariance[started] = 0
            covariance[started, :, 0, 0], covariance[started, :, 1, 1] = variances[started, k], np.square(speeds)
        density = -1.5 * np.log(spread) - (FREEDOM + 3) / 2 * np.log1p(squared / FREEDOM)
        counts = known[k] & ~started & ~young
        young = started | young & ~known[k]  # the next pose says nothing but the velocity
        yield Step(pose, velocity, covariance, predicted, elapsed, used, started, density * counts[:, None])


def smoothed_poses(steps):
    """Return the poses of the RTS smoother over a filter's Steps, a list of N under one setting: N x 7.

    Also returns the velocity at the first of them, 2 x 3.
    """
    pose, velocity = steps[-1].pose, steps[-1].velocity
    poses = [pose]
    for step, after in reversed(list(pairwise(steps))):
        if after.started[0]:
            pose, velocity = step.pose, step.velocity
        else:
            predicted, predicted_velocity, covariance = after.predicted
            crossed = _transition(after.elapsed) @ step.covariance
            gain = np.linalg.solve(covariance, crossed).swapaxes(-1, -2)
            change = gain @ np.stack((difference(pose, predicted), velocity - predicted_velocity), axis=2)
            pose, velocity = moved(step.pose, change[:, :, 0]), step.velocity + change[:, :, 1]
        poses.append(pose)
    return np.concatenate(poses[::-1]), velocity[0]


def smooth(poses, times, variances, accelerations, speeds, causal=False):
    """Smooth the poses of a walk: N x 7 -> N x 7, with unit quaternions whose signs are continuous, and N, used.

    poses, times, accelerations, speeds: as for `filter_steps`, with G = 1; any frame may have no pose, but one has.
    variances: N x 2. causal: filter only; frames before the first pose then have none (NaN).

    used: whether a frame's pose was. The smoother knows a lost track from its first frame on. If fewer poses came
    before than the gate shut out, those are the outliers.
    """
    poses, found = np.array(poses, float), np.full((len(poses), 7), np.nan)
    first = int(np.isfinite(poses).all(axis=1).argmax())

    def run(breaks=()):
        rest = slice(first, None)
        return list(filter_steps(poses[rest], times[rest], variances[None, rest], accelerations[None], speeds,
                                 {k - first for k in breaks}))

    steps = run()
    if causal:
        found[first:] = np.concatenate([step.pose for step in steps])
    else:
        breaks = _breaks(steps, np.isfinite(poses[first:]).all(axis=1)) + first
        if len(breaks):
            if sum(step.used[0] for step in steps[:breaks[0] - first]) < PATIENCE:
                first = int(breaks[0])
            steps = run(breaks)
        found[first:], velocity = smoothed_poses(steps)
        if first:
            back = velocity * (times[:first] - times[first])[:, None, None]
            found[:first] = moved(np.tile(found[first], (first, 1)), back)
    n_without = first if causal else 0
    found[n_without:, 3:] = _continuous(found[n_without:, 3:])
    return found, np.concatenate((np.zeros(first, bool), [step.used[0] for step in steps]))


def fit(sequences, given=(None, None)):
    """Return the noise of the poses of walks: variances 2, accelerations 2, speeds 2, as `smooth` takes them.

    sequences: a list of (poses N x 7 without NaN, times N, relative N x 2): relative is the standard deviation of a
    frame's noise over that of others. given: standard deviations of position and orientation, where they are known.

    Variances and accelerations are those of a small grid under which the innovations of the filter have the greatest
    likelihood. Its middle is the noise that a pose has against the line through its neighbours (median).
    """
    around, steps, elapsed = [], [], []
    for poses, times, _ in (sequence for sequence in sequences if len(sequence[0]) > 1):
        dt = np.diff(times)[:, None, None]
        velocity = difference(poses[1:], poses[:-1]) / dt
        before, after = dt[:-1], dt[1:]
        bend = np.diff(velocity, axis=0) * before * after / (before + after)
        weights = 1 + (np.square(before) + np.square(after)) / np.square(before + after)
        around.append((np.square(bend) / weights).sum(axis=-1))
        steps.append(np.square(velocity).sum(axis=-1))
        elapsed.append(dt.ravel())
    elapsed, speeds = np.median(np.concatenate(elapsed) if elapsed else 1), _typical(steps)
    middle = np.maximum(_typical(around), 1e-6 * elapsed * speeds + 1e-9)
    noise = middle * 2.0 ** np.arange(-2, 5)[:, None]
    for i, value in enumerate(given):
        noise[:, i] = noise[:, i] if value is None else value
    ratios = 10.0 ** np.arange(-8, 2.5, 0.5)
    variances = np.repeat(np.square(noise), len(ratios), axis=0)
    accelerations = variances * np.tile(ratios, len(noise))[:, None] / elapsed ** 3
    speeds = FASTEST * np.maximum(speeds, middle / elapsed)
    total = 0
    for poses, times, relative in sequences:
        of_frames = variances[:, None] * np.square(relative)
        total = total + sum(step.log_density for step in filter_steps(poses, times, of_frames, accelerations, speeds))
    best = np.argmax(total, axis=0), (0, 1)
    return variances[best], accelerations[best], speeds


def _typical(squares):
    """The standard deviation along an axis, robustly, from squared norms: a list of N x 2 -> 2. 0 without any."""
    squares = np.concatenate([np.zeros((0, 2)), *squares])
    return np.sqrt(np.median(squares, axis=0) / MEDIAN) if len(squares) else np.zeros(2)


def _rotations(poses):
    return Rotation.from_quat(np.roll(poses[..., 3:], -1, axis=-1))  # scipy has the scalar last


def _transition(elapsed):
    return np.array([[1, elapsed], [0, 1]])


def _predict(pose, velocity, covariance, elapsed, accelerations):
    """What is expected after some time: pose, velocity and covariance, as in a Step."""
    transition = _transition(elapsed)
    growth = np.array([[elapsed ** 3 / 3, elapsed ** 2 / 2], [elapsed ** 2 / 2, elapsed]])
    covariance = transition @ covariance @ transition.T + accelerations[..., None, None] * growth
    return moved(pose, velocity * elapsed), velocity, covariance


def _breaks(steps, known):
    """The frames at which new tracks start, as one sees looking back: where the poses beyond the gate begin."""
    breaks, begin, n_used, n_out = [], None, 0, 0
    for k, step in enumerate(steps):
        if k and step.started[0]:
            breaks.append(begin)
            begin, n_used, n_out = None, PATIENCE, 0
        elif step.used[0]:
            begin, n_used, n_out = None, n_used + 1, 0
        elif known[k]:
            begin, n_out = k if begin is None else begin, n_out + 1
    if n_out > n_used:  # too few frames are left for a new track
        breaks.append(begin)
    return np.array(breaks, int)


def _continuous(quaternions):
    """Unit quaternions, N x 4, with the sign of the one before; the first has a positive scalar."""
    dots = np.concatenate((quaternions[:1, 0], (quaternions[1:] * quaternions[:-1]).sum(axis=1)))
    signs = np.cumprod(np.where(dots < 0, -1, 1))
    return quaternions * signs[:, None] / np.linalg.norm(quaternions, axis=1, keepdims=True)
