"""Frames with the pose of another frame that sees much of the same, as iAPR is trained on."""
import numpy as np

from datasets.camera_poses import CameraPoseDataset

MAX_DEGREES = 30  # between the orientations of a pair
MAX_SPREADS = 0.5  # between their positions, in the scene's median distances from its median position


class PosePairs(CameraPoseDataset):
    """A CameraPoseDataset whose items have 'other', too: the pose of another frame of the scene (7 numbers, float32).

    It is drawn among the frames within MAX_DEGREES and MAX_SPREADS or, without any, among all of the scene: a function
    of (seed, epoch, position) alone.
    """

    def __getitem__(self, item):
        """The item at (epoch, position); see the class."""
        epoch, position = item if isinstance(item, tuple) else (0, item)
        frame = super().__getitem__(item)
        i = int(np.searchsorted(self.rows, frame["row"]))
        others = overlapping(self.truth.numpy(), self.scenes, i)
        random = np.random.default_rng((self.seed, epoch, position, 1))
        return {**frame, "other": self.poses[random.choice(others)]}


def overlapping(poses, scenes, i):
    """The frames whose views may overlap that of frame i, without itself; i alone in a scene of one frame.

    poses: N x 7, unit quaternions. scenes: N.
    """
    of_scene = np.flatnonzero(scenes == scenes[i])
    others = of_scene[of_scene != i]
    if not len(others):
        return np.array([i])
    positions = poses[of_scene, :3]
    spread = np.median(np.linalg.norm(positions - np.median(positions, axis=0), axis=1))
    distances = np.linalg.norm(poses[others, :3] - poses[i, :3], axis=1)
    norms = np.linalg.norm(poses[others, 3:], axis=1) * np.linalg.norm(poses[i, 3:])
    angles = np.degrees(2 * np.arccos((np.abs(poses[others, 3:] @ poses[i, 3:]) / norms).clip(max=1)))
    near = others[(distances <= MAX_SPREADS * spread) & (angles <= MAX_DEGREES)]
    return near if len(near) else others
