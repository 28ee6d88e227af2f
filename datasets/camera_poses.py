"""Frames with their camera poses, and the published transforms."""
import functools
import glob
import os
import shutil
import sys

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision import transforms

from datasets.image_cache import cache_in_file, cache_in_memory, free_memory, read_frame
from datasets.labels import natural, poses_of, read_labels, scene_indices
from util import processes
from util.errors import UserError

SIZE = 224
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")  # of a folder's images
SHARED_MEMORY = "/dev/shm"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation


def train_transform():
    """The published augmentation of a frame that is resized to a shorter side of 256: PIL image -> PIL image, a random
    crop of 224 x 224 with colour jitter."""
    return transforms.Compose([transforms.RandomCrop(SIZE), transforms.ColorJitter(0.5, 0.5, 0.5, 0.2)])


def test_transform():
    """The published test transform of a frame that is resized to a shorter side of 256: PIL image -> PIL image, its centre,
    224 x 224."""
    return transforms.CenterCrop(SIZE)


def to_input(images):
    """Images as the networks take them: N x H x W x 3 uint8 -> N x 3 x H x W float32, normalised as ImageNet, channels-last
    in memory; on the images' device."""
    mean, std = _imagenet(images.device)
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)


@functools.cache  # a copy a batch would make the device wait
def _imagenet(device):
    return torch.tensor(_IMAGENET, device=device).view(2, 1, 3, 1, 1)


class _Frames(Dataset):
    """Image files, and what is decoded of them once."""

    def __init__(self, paths):
        self.paths = paths
        self.cache = None

    def cache_frames(self, cache_dir=None, memory_gb=None):
        """Decode every frame once, now: into a file of `cache_dir`, or without one into memory, at most `memory_gb` GB (by
        default a quarter of what is free), which the run's processes on a machine share. The items stay the same. Raises
        UserError for an unreadable image."""
        n_threads = n_cores()
        if cache_dir:
            if processes.rank_here() > 0:
                processes.wait()  # for a machine's first, which decodes; the others find the file
            self.cache = cache_in_file(cache_dir, self.paths, self.read, n_threads)
            if processes.rank_here() == 0:
                processes.wait()
        else:
            memory = free_memory() // 4 if memory_gb is None else int(memory_gb * 1e9)
            self.cache = cache_in_memory(self.paths, self.read, n_threads, memory // processes.n_here())

    def read(self, i):
        return read_frame(self.paths[i])

    def frame(self, i):
        pixels = None if self.cache is None else self.cache[i]
        return self.read(i) if pixels is None else Image.fromarray(pixels)


class Images(_Frames):
    """One's own images under the test transform. Items: {'img': 224 x 224 x 3 (uint8)}, asked for as those of
    CameraPoseDataset; `names`: their paths below the folder that holds them all.

    images: a folder, whose images are taken with those of its folders, or a pattern as in a shell. Raises UserError where
    there is none.
    """

    def __init__(self, images):
        folder = os.path.isdir(images)
        found = glob.glob(os.path.join(glob.escape(images), "**", "*") if folder else images, recursive=True)
        paths = [path for path in found if os.path.isfile(path) and (not folder or path.lower().endswith(IMAGE_EXTENSIONS))]
        if not paths:
            raise UserError(f"{images}: no image; give a folder with images or a pattern in quotes, such as 'photos/*.jpg'")
        root = images if folder else os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self.names = sorted((os.path.relpath(path, root) for path in paths), key=natural)
        super().__init__([os.path.join(root, name) for name in self.names])
        self.transform = test_transform()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        _, i = item
        return {"img": torch.from_numpy(np.array(self.transform(self.frame(i))))}


class CameraPoseDataset(_Frames):
    """Items: {'img': 224 x 224 x 3 (uint8), 'pose': 7 numbers (float32), 'scene': index in `scene_names`, -1 if not there,
    'row': the frame's row in the label file}.

    dataset_path: the folder that the label file's image paths are relative to.
    scene_names: the model's scenes in order; by default the label file's, sorted.
    equalize_scenes: an epoch has (frames of the largest scene) x (scenes) items: every frame once, the rest drawn from
        the scenes in proportion to what they lack.

    An item is asked for by its position or by (epoch, position); what is random in it is a function of
    (seed, epoch, position) alone, and a position below the number of rows is that row. Raises UserError for label
    files as `read_labels` does, for a missing image at once, and for an unreadable one when it is reached.
    """

    def __init__(self, dataset_path, labels_file, data_transform=None, equalize_scenes=False, scene_names=None, seed=0):
        self.labels_file = labels_file
        self.labels = read_labels(labels_file)
        super().__init__([os.path.join(dataset_path, path) for path in self.labels["img_path"]])
        for row, path in zip(self.labels["row"], self.paths):
            if not os.path.isfile(path):
                raise UserError(f"{labels_file}: row {row}: image {path} does not exist")
        self.rows = self.labels["row"].to_numpy()
        self.poses = torch.tensor(poses_of(self.labels), dtype=torch.float32)
        self.scene_names = list(scene_names) if scene_names else sorted(set(self.labels["scene"]))
        self.scenes = scene_indices(self.labels, self.scene_names)
        self.transform = data_transform or test_transform()
        self.seed = seed
        self.size = len(self.paths)
        if equalize_scenes:
            present = np.unique(self.scenes)
            self.rows_of_scenes = [np.flatnonzero(self.scenes == scene) for scene in present]
            frames = np.array([len(rows) for rows in self.rows_of_scenes])
            self.size = frames.max() * len(present)
            lacking = frames.max() - frames
            self.scene_probabilities = lacking / max(lacking.sum(), 1)

    def require_scenes(self, num_scenes, order_known):
        """Raise UserError unless every frame has a scene index of a model of `num_scenes` scenes.

        order_known: False for a model that has its scenes already, where the label file's need not be the same.
        """
        if (self.scenes < 0).any():
            row = int(np.argmax(self.scenes < 0))
            raise UserError(f"{self.labels_file}: row {self.labels['row'][row]}: scene '{self.labels['scene'][row]}' is not "
                            f"among the scene_names {', '.join(self.scene_names)}")
        if self.scenes.max() >= num_scenes:
            raise UserError(f"{self.labels_file}: {len(self.scene_names)} scenes, but num_scenes is {num_scenes}")
        if not order_known and len(self.scene_names) != num_scenes:
            raise UserError(f"{self.labels_file}: {len(self.scene_names)} scenes, but the model has {num_scenes}: their order "
                            f"is not known; give --preset or scene_names")

    def read(self, row):
        try:
            return super().read(row)
        except UserError as error:
            raise UserError(f"{self.labels_file}: row {self.labels['row'][row]}: {error}") from error

    def __len__(self):
        return self.size

    def __getitem__(self, item):
        epoch, position = item if isinstance(item, tuple) else (0, item)
        if not 0 <= position < self.size:
            raise IndexError(position)
        row = position
        if position >= len(self.paths):
            random = np.random.default_rng((self.seed, epoch, position))
            row = random.choice(self.rows_of_scenes[random.choice(len(self.rows_of_scenes), p=self.scene_probabilities)])
        image = self.frame(row)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, epoch, position))  # the CPU's alone
            image = self.transform(image)
        return {"img": torch.from_numpy(np.array(image)), "pose": self.poses[row], "scene": int(self.scenes[row]),
                "row": int(self.rows[row])}


def test_batches(dataset, batch_size, n_workers, epoch=0):
    """A loader of this process's share of the dataset, in its order; what is random in its items is that of `epoch`."""
    positions = processes.share([(epoch, position) for position in range(len(dataset))])
    return _loader(dataset, BatchSampler(positions, batch_size, drop_last=False), batch_size, n_workers)


def train_batches(dataset, batch_size, n_workers, seed):
    """A function from an epoch's number to that epoch's batches, shuffled by (seed, epoch) alone. Of several processes each has
    its share of every batch, whose size is that of all shares together, and at least one frame of it."""
    if batch_size < processes.count():
        raise UserError(f"batch_size {batch_size} is that of all processes together and must be at least their number, "
                        f"{processes.count()}")
    sampler = _EpochBatches(len(dataset), batch_size, seed)
    loader = _loader(dataset, sampler, -(-batch_size // processes.count()), n_workers)

    def batches(epoch):
        sampler.epoch = epoch
        return loader

    return batches


class _EpochBatches(Sampler):
    def __init__(self, size, batch_size, seed):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self):
        return -(-self.size // self.batch_size)

    def __iter__(self):
        for batch in epoch_order(self.size, self.seed, self.epoch).split(self.batch_size):
            positions = batch.tolist()
            # A last batch of fewer frames than processes: one more time its first, rather than none.
            yield [(self.epoch, position) for position in processes.share(positions) or positions[:1]]


def epoch_order(size, seed, epoch):
    """The order of an epoch: a permutation that (seed, epoch) determine."""
    return torch.randperm(size, generator=epoch_generator(seed, epoch))


def epoch_generator(seed, epoch):
    """A random generator (CPU) that (seed, epoch) determine."""
    return torch.Generator().manual_seed(mix(seed, epoch))


def mix(*numbers):
    """A seed that numbers determine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _loader(dataset, batches, batch_size, n_workers):
    n_workers = min(n_workers, n_cores())  # more only take turns
    if n_workers and os.path.isdir(SHARED_MEMORY):
        # Workers hand over batches in shared memory, two each at a time; a container has 64 MB of it, and overrunning it
        # kills them.
        free = shutil.disk_usage(SHARED_MEMORY).free // processes.n_here()
        n_workers = min(n_workers, free // (4 * batch_size * SIZE * SIZE * 3))
    # Forked, to share the cache; where that is unsafe, a cache stays in its process.
    context = "fork" if n_workers and sys.platform == "linux" else None
    if context is None and getattr(dataset, "cache", None) is not None:
        n_workers = 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=n_workers, persistent_workers=n_workers > 0,
                      multiprocessing_context=context, pin_memory=torch.cuda.is_initialized(),
                      generator=torch.Generator())  # not the global one, which would tell the number of workers


def n_cores():
    """The CPU cores that this process may use; several of a run share a machine's."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(n // processes.n_here(), 1)
