"""Pose errors."""
import numpy as np
import torch

BLOCK = 25  # frames


def pose_err(est_pose, gt_pose):
    """Position errors in metres and orientation errors in degrees: two of N x 7 -> N, N, float64.

    The orientation error is the angle of the rotation between the two, 2 acos |<q, q'>| of the unit quaternions,
    computed from their difference and sum so that it is exact near 0 too. Quaternions need not be unit.
    """
    est_pose, gt_pose = est_pose.double(), gt_pose.double()
    position_error = torch.linalg.vector_norm(est_pose[:, :3] - gt_pose[:, :3], dim=1)
    est_q, gt_q = (q / torch.linalg.vector_norm(q, dim=1, keepdim=True) for q in (est_pose[:, 3:], gt_pose[:, 3:]))
    chords = torch.stack((torch.linalg.vector_norm(est_q - gt_q, dim=1), torch.linalg.vector_norm(est_q + gt_q, dim=1)))
    return position_error, torch.rad2deg(4 * torch.atan2(chords.amin(dim=0), chords.amax(dim=0)))


def changes(before, after, n_samples=5000):
    """By how much refinement changes the median errors, in per cent, with 95 % intervals: two of (change, low, high), of
    position and of orientation.

    before, after: errors as pose_err gives them, each two of ... x N, N consecutive frames; leading dimensions are runs on
    the same frames, whose medians are taken over all of them. The intervals are the percentiles of a paired bootstrap over
    blocks of at most BLOCK frames, since neighbouring frames err alike (Kuensch, 1989); NaN with fewer than four blocks.
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
    # No negative zeros, and no rounding, where nothing changes.
    return tuple(zip(*(np.round(values, 3) + 0.0 for values in (change(slice(None)), low, high))))


def median_errors(est_pose, gt_pose):
    """The median errors of position in metres and of orientation in degrees: two of N x 7 -> [float, float]."""
    return [float(np.median(errors.numpy())) for errors in pose_err(est_pose, gt_pose)]


def medians(est_pose, gt_pose):
    """'0.123[m], 4.567[deg]': the median errors in the published form."""
    return "{:.3f}[m], {:.3f}[deg]".format(*median_errors(est_pose, gt_pose))
