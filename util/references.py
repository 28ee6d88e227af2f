"""Reference poses: training poses that stand for a query's surroundings."""
import logging
import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

from datasets.labels import mend, poses_of, read_labels, scene_indices
from util.errors import UserError
from util.files import same_file
from util.rotations import unit_poses

CHUNK = 1024  # queries at a time, so that memory grows with the references alone
SAME_POSE = 1e-4  # metres, and of a quaternion's numbers; more than single precision loses at a kilometre


def pose_distances(poses, references):
    """How far references are from poses: the distance in position and the distance between unit quaternions (the nearer
    sign), each over its maximum among the references, summed. N x 7, R x 7 -> N x R."""
    # Not by products, which lose decimetres at 150 m.
    positions = torch.cdist(poses[:, :3], references[:, :3], compute_mode="donot_use_mm_for_euclid_dist")
    cosines = F.normalize(poses[:, 3:], dim=1) @ F.normalize(references[:, 3:], dim=1).T
    orientations = (2 - 2 * cosines.abs()).clamp(min=0).sqrt()
    tiny = torch.finfo(poses.dtype).tiny  # a single reference, or identical ones, are all equally near
    return sum(d / d.amax(dim=1, keepdim=True).clamp(min=tiny) for d in (positions, orientations))


def nearest_references(poses, scenes, references, reference_scenes, k):
    """The k nearest references of the same scene.

    poses N x 7, scenes N; references R x 7, reference_scenes R. Returns N x k rows of the references, nearest first; a
    scene with fewer repeats them, and without any gives -1.
    """
    nearest = torch.full((len(poses), k), -1, device=poses.device)
    for scene in scenes.unique():
        candidates = (reference_scenes == scene).nonzero().squeeze(1)
        n_nearest = min(k, len(candidates))
        if n_nearest == 0:
            continue
        for queries in (scenes == scene).nonzero().squeeze(1).split(CHUNK):
            distances = pose_distances(poses[queries], references[candidates])
            found = candidates[distances.topk(n_nearest, largest=False).indices]
            nearest[queries] = found[:, torch.arange(k, device=poses.device) % n_nearest]
    return nearest


def read_references(path, dataset, scene_names, num_scenes=None, allow_query_poses=False):
    """Reference poses from a label file of training frames: R x 7 float32 with unit quaternions, per reference its scene
    index, -1 for a scene that the model does not know; positions are relative to the dataset's origin. And whether the references hold answers (only where
    `allow_query_poses` lets them).

    dataset: what is tested; scene_names: the model's in order, or None; num_scenes: None for a single-scene model, whose
    scene is 0.

    Raises UserError where the file holds answers: it is the tested one, shares a frame with it, or has a pose that equals a
    tested one; where it is of other scenes than the tested; and where the scenes' order is not known.
    """
    labels = read_labels(path)
    answers = _answers(path, labels, dataset)
    if answers and not allow_query_poses:
        raise UserError(f"--ref_poses_file {path}: {answers}: it holds the answers; give the training labels (or "
                        f"--allow_query_poses, to reproduce the published procedure)")
    if answers:
        logging.info("--ref_poses_file %s: %s", path, answers)
    if not set(labels["scene"]) & set(dataset.labels["scene"]):
        raise UserError(f"--ref_poses_file {path}: has {_some(labels['scene'])}, but the frames under test are of "
                        f"{_some(dataset.labels['scene'])}; give the training labels of the same scenes")
    n_listed = len(labels)
    labels, _ = mend(labels)
    if len(labels) < n_listed:
        logging.info("--ref_poses_file %s: %d poses far outside the rest, or listed again, left out", path, n_listed - len(labels))
    poses = torch.tensor(poses_of(labels))
    poses[:, :3] -= dataset.origin
    references = unit_poses(poses.float())
    if num_scenes is None:
        others = ~labels["scene"].isin(set(dataset.labels["scene"]))
        if others.any():
            logging.info("--ref_poses_file %s: %d poses of other scenes left out", path, others.sum())
        return references, -torch.tensor(others.to_numpy(), dtype=torch.long), bool(answers)
    names = scene_names or sorted(set(labels["scene"]))
    if scene_names is None and len(names) != num_scenes:
        raise UserError(f"--ref_poses_file {path}: {len(names)} scenes, but the model has {num_scenes}: their order "
                        f"is not known; give --preset or scene_names")
    return references, torch.tensor(scene_indices(labels, names)), bool(answers)


def _answers(path, labels, dataset):
    """What of the frames under test a label file gives away, in words; '' where nothing."""
    tested = dataset.labels
    if same_file(path, dataset.labels_file):
        return f"is the label file under test, all {len(labels)} of its poses are under test"
    shared = labels["img_path"].map(os.path.normpath).isin(set(tested["img_path"].map(os.path.normpath)))
    if shared.any():
        first = labels[shared].iloc[0]
        return f"{shared.sum()} of its frames are among those under test (row {first['row']}: {first['img_path']})"
    equal = equal_poses(poses_of(labels), poses_of(tested))
    if equal.any():
        first = labels[equal].iloc[0]
        return (f"{equal.sum()} of its poses equal one of a frame under test, whatever the frames are called (row {first['row']}: "
                f"{first['img_path']})")
    return ""


def equal_poses(poses, others):
    """Which of R poses equal one of N others, within SAME_POSE in every number, for either sign of the unit quaternion.
    R x 7, N x 7 (arrays) -> R."""
    poses, others = (unit_poses(torch.tensor(array, dtype=torch.float64)).numpy() for array in (poses, others))
    tree = cKDTree(np.concatenate((others, others * [1, 1, 1, -1, -1, -1, -1])))
    return np.isfinite(tree.query(poses, distance_upper_bound=SAME_POSE, p=np.inf)[0])


def _some(scenes):
    names = sorted(set(scenes))
    return f"the scene {names[0]}" if len(names) == 1 else f"the scenes {', '.join(names[:7])}{', ...' * (len(names) > 7)}"
