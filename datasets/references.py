"""Reference poses: the training poses that refinement looks up instead of training images."""
import logging
import os

import numpy as np
import torch
from scipy.spatial import cKDTree

from datasets.labels import fix_labels, poses_of, read_labels, scene_indices
from util.errors import UserError
from util.files import same_file
from util.rotations import unit_poses

SAME_POSE = 1e-4  # metres, and units of a quaternion's numbers; more than single precision loses at a kilometre


def read_references(path, dataset, scene_names, num_scenes=None, allow_query_poses=False):
    """Reference poses from a label file of training frames: (poses, scenes, leaks).

    poses: R x 7 float32, positions relative to the dataset's origin, unit quaternions. scenes: R scene indices, -1 for
    a scene that the model does not know. leaks: whether the references contain answers, that is, poses of the frames
    under test.

    dataset: the CameraPoseDataset under test. scene_names: the model's in order, or None. num_scenes: the model's; None
    for a single-scene model, whose scene index is 0. allow_query_poses: accept references that contain answers.

    Raises UserError where the file contains answers: it is the tested file, or shares a frame with it, or has a pose
    equal to a tested one. Raises it, too, where no reference has a tested scene, and where the order of scenes is
    unknown.
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
    labels, _ = fix_labels(labels)
    if len(labels) < n_listed:
        logging.info("--ref_poses_file %s: %d poses far outside the rest, or listed again, left out", path,
                     n_listed - len(labels))
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


def check_remembered(path, poses, dataset, allow_query_poses=False):
    """Whether poses that a PAE remembers are those of frames under test. Raises UserError for these, unless allowed.

    path: of the PAE. poses: M x 7, relative to the dataset's origin. dataset: the CameraPoseDataset under test.
    """
    n_answers = equal_poses(poses.cpu().numpy(), dataset.poses.numpy()).sum() if len(poses) else 0
    if not n_answers:
        return False
    problem = f"{n_answers} of the {len(poses)} poses that it remembers of its training are under test"
    if not allow_query_poses:
        raise UserError(f"{path}: {problem}: it holds the answers; train the PAE on the training labels (or give "
                        "--allow_query_poses)")
    logging.info("%s: %s", path, problem)
    return True


def _answers(path, labels, dataset):
    """Which poses of the frames under test a label file contains, in words; '' for none."""
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
        return (f"{equal.sum()} of its poses equal one of a frame under test, whatever the frames are called "
                f"(row {first['row']}: {first['img_path']})")
    return ""


def equal_poses(poses, others):
    """Which of R poses equal one of N others: R x 7, N x 7 (arrays) -> R.

    Equal poses agree within SAME_POSE in every number, for either sign of the unit quaternion.
    """
    poses, others = (unit_poses(torch.tensor(array, dtype=torch.float64)).numpy() for array in (poses, others))
    tree = cKDTree(np.concatenate((others, others * [1, 1, 1, -1, -1, -1, -1])))
    return np.isfinite(tree.query(poses, distance_upper_bound=SAME_POSE, p=np.inf)[0])


def _some(scenes):
    """Up to seven names of scenes, in words."""
    names = sorted(set(scenes))
    if len(names) == 1:
        return f"the scene {names[0]}"
    return f"the scenes {', '.join(names[:7])}{', ...' * (len(names) > 7)}"
