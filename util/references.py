"""Reference poses: training poses that stand for a query's surroundings."""
import os

import torch
import torch.nn.functional as F

from datasets.labels import poses_of, read_labels, scene_indices
from util.errors import UserError
from util.files import same_file

CHUNK = 1024  # queries at a time, so that memory grows with the references alone


def pose_distances(poses, references):
    """How far references are from poses: the distance in position and the distance between unit quaternions (the nearer
    sign), each over its maximum among the references, summed. N x 7, R x 7 -> N x R."""
    positions = torch.cdist(poses[:, :3], references[:, :3])
    cosines = F.normalize(poses[:, 3:], dim=1) @ F.normalize(references[:, 3:], dim=1).T
    orientations = (2 - 2 * cosines.abs()).clamp(min=0).sqrt()
    tiny = torch.finfo(poses.dtype).tiny  # a single reference, or identical ones, are all equally near
    return sum(d / d.amax(dim=1, keepdim=True).clamp(min=tiny) for d in (positions, orientations))


def nearest_references(poses, scenes, references, reference_scenes, k, exclude_self=False):
    """The k nearest references of the same scene.

    poses N x 7, scenes N; references R x 7, reference_scenes R; exclude_self: the references are the poses, and none is
    its own reference. Returns N x k rows of the references, nearest first; a scene with fewer repeats them, and without
    any gives -1.
    """
    nearest = torch.full((len(poses), k), -1, device=poses.device)
    for scene in scenes.unique():
        candidates = (reference_scenes == scene).nonzero().squeeze(1)
        n_nearest = min(k, len(candidates) - exclude_self)
        if n_nearest < 1:
            continue
        for queries in (scenes == scene).nonzero().squeeze(1).split(CHUNK):
            distances = pose_distances(poses[queries], references[candidates])
            if exclude_self:
                distances[queries[:, None] == candidates[None]] = torch.inf
            found = candidates[distances.topk(n_nearest, largest=False).indices]
            nearest[queries] = found[:, torch.arange(k, device=poses.device) % n_nearest]
    return nearest


def read_references(path, dataset, scene_names, num_scenes=None):
    """Reference poses from a label file of training frames: R x 7 float32 and, per reference, its scene index -1 for a
    scene that the model does not know.

    dataset: what is tested; scene_names: the model's in order, or None; num_scenes: None for a single-scene model, whose
    scenes are all 0. Raises UserError where the file is the tested one or shares a frame with it, and where the
    scenes' order is not known.
    """
    if same_file(path, dataset.labels_file):
        raise UserError(f"--ref_poses_file {path} is the label file under test, which holds the answers; give the training "
                        f"labels")
    labels = read_labels(path)
    shared = labels["img_path"].map(os.path.normpath).isin(set(dataset.labels["img_path"].map(os.path.normpath)))
    if shared.any():
        first = labels[shared].iloc[0]
        raise UserError(f"--ref_poses_file {path}: {shared.sum()} of its frames are among those under test, which holds the "
                        f"answers (row {first['row']}: {first['img_path']}); give the training labels")
    references = torch.tensor(poses_of(labels), dtype=torch.float32)
    if num_scenes is None:
        return references, torch.zeros(len(references), dtype=torch.long)
    names = scene_names or sorted(set(labels["scene"]))
    if scene_names is None and len(names) != num_scenes:
        raise UserError(f"--ref_poses_file {path}: {len(names)} scenes, but the model has {num_scenes}: their order "
                        f"is not known; give --preset or scene_names")
    return references, torch.tensor(scene_indices(labels, names))
