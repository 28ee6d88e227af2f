"""Frames with their camera poses, from a label file."""
import logging
import os

import numpy as np
import torch

from datasets.frames import Frames, image_paths
from datasets.images import UnreadableImage
from datasets.labels import far_origin, poses_of, read_labels, scene_indices
from datasets.transforms import test_transform
from util.errors import UserError, first_five
from util.seeds import mix


class CameraPoseDataset(Frames):
    """Frames with their poses. `poses`: all of them, N x 7 float32; `truth`: the same as labelled, float64.

    Items: {'img': 224 x 224 x 3 (uint8), 'pose': 7 numbers (float32), its position relative to `origin`, 'scene': index
    in `scene_names`, or -1 for another scene, 'row': the frame's row in the label file}.

    An item is indexed by its position, or by (epoch, position). What is random in it is a function of (seed, epoch,
    position) alone. A position below the number of rows is that row.
    """

    def __init__(self, dataset_path, labels_file, data_transform=None, equalize_scenes=False, scene_names=None, seed=0,
                 origin=None):
        """Read the labels.

        dataset_path: the folder that the label file's image paths are relative to.
        data_transform: PIL image -> PIL image (default: test_transform).
        equalize_scenes: an epoch has (frames of the largest scene) x (scenes) items: every frame once, the rest drawn
            from the scenes in proportion to what they lack.
        scene_names: the model's scenes in order (default: those of the label file, sorted).
        origin: 3 numbers (float64) of an APR that has one (default: the labels' own).

        Raises UserError for label files as `read_labels` does, and for a missing image. An unreadable image raises it
        when it is read.
        """
        self.labels_file = labels_file
        self.labels = read_labels(labels_file)
        super().__init__(image_paths(dataset_path, self.labels))
        missing = [f"row {row}: image {path} does not exist"
                   for row, path in zip(self.labels["row"], self.paths, strict=True) if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{labels_file}: {first_five(missing)}{_advice(dataset_path, self.labels['img_path'])}")
        self.rows = self.labels["row"].to_numpy()
        self.truth = torch.tensor(poses_of(self.labels))
        self.origin, self.poses = torch.zeros(3, dtype=torch.double), self.truth.float()
        if origin is not None:
            self.move_to(origin)
        self.scene_names = list(scene_names) if scene_names else sorted(set(self.labels["scene"]))
        self.scenes = scene_indices(self.labels, self.scene_names)
        self.transform = data_transform or test_transform()
        self.seed = seed
        self.size = len(self.paths)
        if equalize_scenes:
            present = np.unique(self.scenes)
            self.rows_of_scenes = [np.flatnonzero(self.scenes == scene) for scene in present]
            n_frames = np.array([len(rows) for rows in self.rows_of_scenes])
            self.size = n_frames.max() * len(present)
            lacking = n_frames.max() - n_frames
            self.scene_probabilities = lacking / max(lacking.sum(), 1)
        self.log_orientations("taken as stored, as their labels are")

    def move_to(self, origin):
        """Make positions relative to an APR's origin: 3 numbers (float64), or None for the labels' own.

        Warns where the origin is far from the positions.
        """
        self.origin = torch.zeros(3, dtype=torch.double) if origin is None else origin.cpu()
        positions = self.truth[:, :3] - self.origin
        self.poses = torch.cat((positions, self.truth[:, 3:]), dim=1).float()
        centre = far_origin(positions.numpy())
        if centre is not None:
            step = np.spacing(np.abs(centre).max().astype(np.float32))
            logging.warning("%s: the positions are about %.3g from the origin of these weights, which know another "
                            "place, or keep no origin (here float32 has steps of %.2g)",
                            self.labels_file, np.linalg.norm(centre), step)

    def require_scenes(self, num_scenes, order_known):
        """Raise UserError unless every frame has a scene index of a model of `num_scenes` scenes.

        order_known: False for a trained model whose scene names are unknown; the label file's may differ from them.
        """
        if (self.scenes < 0).any():
            row = int(np.argmax(self.scenes < 0))
            raise UserError(f"{self.labels_file}: row {self.labels['row'][row]}: scene '{self.labels['scene'][row]}' "
                            f"is not among the scene_names {', '.join(self.scene_names)}")
        if self.scenes.max() >= num_scenes:
            raise UserError(f"{self.labels_file}: {len(self.scene_names)} scenes, but num_scenes is {num_scenes}")
        if not order_known and len(self.scene_names) != num_scenes:
            raise UserError(f"{self.labels_file}: {len(self.scene_names)} scenes, but the model has {num_scenes}: "
                            f"their order is not known; give --preset or scene_names")

    def read(self, row):
        """The frame of a row, decoded now: a PIL image with a shorter side of 256. Raises UnreadableImage."""
        try:
            return super().read(row)
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.labels_file}: row {self.labels['row'][row]}: {error}") from error

    def __len__(self):
        """The number of items per epoch."""
        return self.size

    def __getitem__(self, item):
        """The item at (epoch, position), or at a position; see the class."""
        epoch, position = item if isinstance(item, tuple) else (0, item)
        if not 0 <= position < self.size:
            raise IndexError(position)
        row = position
        if position >= len(self.paths):
            random = np.random.default_rng((self.seed, epoch, position))
            scene = random.choice(len(self.rows_of_scenes), p=self.scene_probabilities)
            row = random.choice(self.rows_of_scenes[scene])
        image = self.frame(row)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, epoch, position))  # the CPU's alone
            image = self.transform(image)
        return {"img": torch.from_numpy(np.array(image)), "pose": self.poses[row], "scene": int(self.scenes[row]),
                "row": int(self.rows[row])}


def _advice(dataset_path, img_paths):
    """What folder to give instead of one that lacks the images, in words; '' where none near it has them."""
    above = os.path.dirname(os.path.abspath(dataset_path))
    inside = []
    if os.path.isdir(dataset_path):
        inside = sorted(entry.path for entry in os.scandir(dataset_path) if entry.is_dir())
    for folder, where in ((above, "above"), *((path, "in it") for path in inside)):
        if all(os.path.isfile(os.path.join(folder, path)) for path in img_paths.iloc[[0, -1]]):
            return f"; paths are relative to the folder {where}: give {folder}"
    return ""
