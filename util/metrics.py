"""Pose errors, their medians, the change of medians by refinement, and how well a score tells large errors."""
import numpy as np
import torch

BLOCK = 25  # frames per block of the bootstrap


def pose_err(est_pose, gt_pose):
    """Return position errors in metres and orientation errors in degrees: N x 7, N x 7 -> N, N, in float64.

    The orientation error is the angle of the rotation between the two: 2 acos |<q, q'>| for unit quaternions. It is
    computed from their difference and sum, so that it is exact near 0 too. Quaternions need not be unit.
    """
    est_pose, gt_pose = est_pose.double(), gt_pose.double()
    position_error = torch.linalg.vector_norm(est_pose[:, :3] - gt_pose[:, :3], dim=1)
    est_q, gt_q = (q / torch.linalg.vector_norm(q, dim=1, keepdim=True) for q in (est_pose[:, 3:], gt_pose[:, 3:]))
    chords = torch.stack((torch.linalg.vector_norm(est_q - gt_q, dim=1), torch.linalg.vector_norm(est_q + gt_q, dim=1)))
    return position_error, torch.rad2deg(4 * torch.atan2(chords.amin(dim=0), chords.amax(dim=0)))


def changes(before, after, n_samples=5000):
    """Return the change of the median errors by refinement, in per cent, with 95 % intervals.

    before, after: errors of the same frames as `pose_err` returns them, (position, orientation), each ... x N for N
    consecutive frames. Leading dimensions are runs; medians are taken over all of them.

    Returns (change, low, high) of the position error and of the orientation error. The intervals are percentiles of a
    paired bootstrap over blocks of at most BLOCK frames, since errors of neighbouring frames are correlated (Kuensch,
    1989). With fewer than four blocks they are NaN.
    """
    random = np.random.default_rng(0)
    before, after = (np.stack([np.atleast_2d(errors) for errors in pair]) for pair in (before, after))  # 2 x runs x N
    blocks = np.array_split(np.arange(before.shape[-1]), -(-before.shape[-1] // BLOCK))

    def change(frames):
        medians = [np.median(errors[..., frames], axis=(1, 2)) for errors in (before, after)]
        return 100 * (medians[1] / np.maximum(medians[0], 1e-12) - 1)

    samples = [change(np.concatenate([blocks[i] for i in random.integers(len(blocks), size=len(blocks))]))
               for _ in range(n_samples)] if len(blocks) >= 4 else [np.full(2, np.nan)]
    low, high = np.percentile(samples, (2.5, 97.5), axis=0)
    # Rounding, and the addition of 0, show no change as 0: neither as -0 nor as a rounding error.
    return tuple(zip(*(np.round(values, 3) + 0.0 for values in (change(slice(None)), low, high))))


def median_errors(est_pose, gt_pose):
    """Return the median errors of position in metres and of orientation in degrees: N x 7, N x 7 -> [float, float]."""
    return [float(np.median(errors.numpy())) for errors in pose_err(est_pose, gt_pose)]


def format_medians(errors):
    """Return median errors in the published form: '0.123[m], 4.567[deg]'."""
    return "{:.3f}[m], {:.3f}[deg]".format(*errors)


def kept_errors(errors, score):
    """Return the mean errors of the frames that are kept as those of the highest score are left out: N (arrays).

    errors, score: N each. Element i is the mean over the i + 1 frames of the lowest score.
    """
    return np.cumsum(errors[np.argsort(score, kind="stable")]) / np.arange(1, len(errors) + 1)


def ause(errors, score):
    """Return the area under the sparsification error curve (Ilg et al., ECCV 2018, section 4.3), N each -> number.

    It is the mean distance between the curves of `kept_errors` by score and by the errors themselves (the oracle),
    divided by the mean error: 0 for a score that ranks frames as their errors do. Chance is `kept_errors` of all frames
    everywhere, see `ause_of_chance`.
    """
    return float(np.mean(kept_errors(errors, score) - kept_errors(errors, errors)) / max(errors.mean(), 1e-12))


def ause_of_chance(errors):
    """Return the area under the sparsification error curve of a score that says nothing: errors N -> number."""
    return float(1 - np.mean(kept_errors(errors, errors)) / max(errors.mean(), 1e-12))
