"""Rotations as quaternions, scalar first."""
import torch


def unit_poses(poses):
    """Return poses with their quaternions normalised: ... x 7 -> ... x 7."""
    return torch.cat((poses[..., :3], torch.nn.functional.normalize(poses[..., 3:], dim=-1)), dim=-1)


def on_side_of(quaternions, others):
    """Return quaternions with the sign that is nearer to `others`: ... x 4, ... x 4 -> ... x 4."""
    return torch.where((quaternions * others).sum(dim=-1, keepdim=True) < 0, -quaternions, quaternions)


def conjugate(quaternions):
    """Return the conjugates of quaternions, for unit ones the inverse rotations: ... x 4 -> ... x 4."""
    return torch.cat((quaternions[..., :1], -quaternions[..., 1:]), dim=-1)


def multiply_quaternions(left, right):
    """Return Hamilton products: N x 4, N x 4 -> N x 4. As rotations, `right` is applied first."""
    w1, v1, w2, v2 = left[:, :1], left[:, 1:], right[:, :1], right[:, 1:]
    return torch.cat((w1 * w2 - (v1 * v2).sum(1, keepdim=True), w1 * v2 + w2 * v1 + torch.linalg.cross(v1, v2)), dim=1)


def quaternion_of(rotation_vectors):
    """Return the unit quaternions of rotation vectors (axis times angle in radians): N x 3 -> N x 4.

    Differentiable at 0 too.
    """
    squared = rotation_vectors.square().sum(dim=1, keepdim=True)
    small = squared < 1e-12
    half = torch.where(small, 1, squared).sqrt() / 2
    return torch.cat((torch.where(small, 1 - squared / 8, half.cos()),
                      torch.where(small, 0.5, half.sin() / (2 * half)) * rotation_vectors), dim=1)


def mean_quaternion(quaternions, weights=None):
    """Return the mean rotation as a unit quaternion: ... x N x 4, weights ... x N -> ... x 4.

    It is the principal eigenvector of the sum of the quaternions' weighted outer products, which do not depend on their
    signs (Markley et al., Averaging Quaternions, 2007, eq. 12).
    """
    unit = torch.nn.functional.normalize(quaternions, dim=-1)
    weighted = unit if weights is None else unit * weights.unsqueeze(-1)
    return torch.linalg.eigh(weighted.mT @ unit).eigenvectors[..., -1]
