"""Camera paths through a scene: smooth, clear of obstacles, and a test path apart from the training paths."""
import numpy as np

from datasets.synthetic_scenes.render import camera_rotation
from datasets.synthetic_scenes.surfaces import UP
from util.errors import UserError

TRAIN_SEQUENCES = 6  # and one for testing
MIN_DISTANCE, MIN_ANGLE = 0.05, 2  # metres, degrees: a test frame differs from every training frame by one of these
CLEARANCE = 0.25  # metres between a camera and the boxes
MAX_TRIES = 2000  # per path


def camera_path(scene, n_frames, random, excursion=(0, 0)):
    """A smooth path: positions n x 3 in metres, and camera-to-world rotations n x 3 x 3.

    It stays CLEARANCE metres away from the scene's boxes. Raises UserError where it finds no such path.

    excursion: metres along x and degrees about the vertical. The path is moved and turned by them in its second half.
    """
    low, high = (np.concatenate((camera, target, [roll]))
                 for camera, target, roll in zip(scene.cameras, scene.targets, (-4, 4), strict=True))
    for _ in range(MAX_TRIES):
        k = np.arange(1, 4)[:, None]
        frequencies, phases = k * random.uniform(0.6, 1.4, (3, 7)), random.uniform(0, 2 * np.pi, (3, 7))
        amplitudes = random.uniform(0.4, 1, (3, 7)) / k ** 0.5
        fine = _waves(amplitudes, frequencies, phases, 500)
        lowest, span = fine.min(axis=0), np.ptp(fine, axis=0)
        positions = (low + (fine - lowest) / span * (high - low))[:, :3]
        positions[:, 0] += excursion[0] * _second_half(len(positions))
        if min(box.distance(positions).min() for box in scene.boxes) > CLEARANCE:
            path = low + (_waves(amplitudes, frequencies, phases, n_frames) - lowest) / span * (high - low)
            directions = _turned(path[:, 3:6] - path[:, :3], excursion[1] * _second_half(n_frames))
            path[:, 0] += excursion[0] * _second_half(n_frames)
            rotations = [camera_rotation(direction, roll)
                         for direction, roll in zip(directions, path[:, 6], strict=True)]
            return path[:, :3], np.stack(rotations)
    raise UserError("no free path for the camera in this scene; give another --seed")


def _second_half(n):
    """0 in the first half of n times, and 1 in the second; a smooth step of a tenth lies between."""
    t = ((np.linspace(0, 1, n) - 0.45) / 0.1).clip(0, 1)
    return t * t * (3 - 2 * t)


def _turned(directions, degrees):
    """Directions turned about the vertical: n x 3, n -> n x 3."""
    angles = np.radians(degrees)[:, None]
    return np.cos(angles) * directions + np.sin(angles) * np.cross(UP, directions) + (
        (1 - np.cos(angles)) * (directions @ UP)[:, None] * UP)


def _waves(amplitudes, frequencies, phases, n):
    """Sums of sine waves at n times from 0 to 2 pi: waves x 7 of each parameter -> n x 7."""
    t = np.linspace(0, 2 * np.pi, n)[:, None, None]
    return (amplitudes * np.sin(frequencies * t + phases)).sum(axis=1)


def train_and_test_paths(scene, n_frames, random):
    """TRAIN_SEQUENCES paths for training, then one for testing, as camera_path returns them; and a distance.

    The distance is the median over test frames of that to the nearest training position, in metres. Every test frame is
    MIN_DISTANCE or MIN_ANGLE from every training frame. Raises UserError where it finds no such path.
    """
    train = [camera_path(scene, n_frames, random) for _ in range(TRAIN_SEQUENCES)]
    positions, rotations = (np.concatenate(parts) for parts in zip(*train, strict=True))
    for _ in range(MAX_TRIES):
        test, nearest = camera_path(scene, n_frames, random, scene.excursion), []
        for position, rotation in zip(*test, strict=True):
            distances = np.linalg.norm(positions - position, axis=1)
            traces = np.einsum("aij,ij->a", rotations, rotation)
            angles = np.degrees(np.arccos(((traces - 1) / 2).clip(-1, 1)))
            if ((distances < MIN_DISTANCE) & (angles < MIN_ANGLE)).any():
                break
            nearest.append(distances.min())
        else:
            return [*train, test], np.median(nearest)
    raise UserError("no test path that keeps apart from the training paths; give fewer --frames or another --seed")
