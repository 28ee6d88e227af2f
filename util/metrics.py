"""Pose errors."""
import numpy as np
import torch


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


def medians(est_pose, gt_pose):
    """'0.123[m], 4.567[deg]': the median errors in the published form."""
    return "{:.3f}[m], {:.3f}[deg]".format(*(np.median(errors.numpy()) for errors in pose_err(est_pose, gt_pose)))
