"""Frames with their camera poses, and the published transforms."""
import functools
import glob
import logging
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision import transforms

from datasets.image_cache import cache_in_file, cache_in_memory, free_memory, read_frame
from datasets.images import HEIF_ADVICE, HEIF_EXTENSIONS, IMAGE_EXTENSIONS, UnreadableImage, path_is, read_header
from datasets.labels import far_origin, natural, poses_of, read_labels, scene_indices
from util import processes
from util.errors import UserError, first_five
from util.progress import progress

SIZE = 224
SHARED_MEMORY = "/dev/shm"
OPEN_FILES = "/proc/self/fd"
FILES_PER_WORKER = 20
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
    """Image files, and what is decoded of them once. upright: turn them as their EXIF orientation says."""

    def __init__(self, paths, upright=False):
        self.paths, self.upright = paths, upright
        self.cache = None

    def log_orientations(self, done):
        """Log how many images have an EXIF orientation, and what is done about it, in words: nothing where none has."""
        with ThreadPoolExecutor(n_cores()) as pool:
            turned = sum(orientation > 1 for *_, orientation in pool.map(read_header, self.paths))
        if turned:
            logging.info("EXIF orientation: %d of %d images have one, and are %s", turned, len(self.paths), done)

    def cache_frames(self, cache_dir=None, memory_gb=None):
        """Decode every frame once, now: into a file of `cache_dir`, or without one into memory, at most `memory_gb` GB (by
        default a quarter of what is free), which the run's processes on a machine share. The items stay the same. Raises
        UserError for unreadable images."""
        n_threads = n_cores()
        with self.naming_all_unreadable():
            if cache_dir:
                if processes.rank_here() > 0:
                    processes.wait()  # for a machine's first, which decodes; the others find the file
                self.cache = cache_in_file(cache_dir, self.paths, self.read, n_threads, "upright" if self.upright else "as stored")
                if processes.rank_here() == 0:
                    processes.wait()
            else:
                memory = free_memory() // 4 if memory_gb is None else int(memory_gb * 1e9)
                self.cache = cache_in_memory(self.paths, self.read, n_threads, memory // processes.n_here())

    @contextmanager
    def naming_all_unreadable(self):
        """Within the block, a first image that cannot be read ends in a UserError that counts all of them: the others are
        decoded for that."""
        try:
            yield
        except UnreadableImage:
            def problem(i):
                try:
                    self.read(i)
                except UnreadableImage as error:
                    return str(error)

            with ThreadPoolExecutor(n_cores()) as pool:
                found = progress(pool.map(problem, range(len(self.paths))), total=len(self.paths), desc="reading", unit="frame")
                problems = [text for text in found if text]
            if len(problems) > 1:
                raise UserError(first_five(problems)) from None
            raise

    def read(self, i):
        return read_frame(self.paths[i], self.upright)

    def frame(self, i):
        pixels = None if self.cache is None else self.cache[i]
        return self.read(i) if pixels is None else Image.fromarray(pixels)


class Images(_Frames):
    """One's own images under the test transform. Items: {'img': 224 x 224 x 3 (uint8), 'readable': whether it could be
    read; if not, it is black}, asked for as those of CameraPoseDataset; `names`: their paths below the folder that holds
    them all.

    images: a folder, whose images are taken with those of its folders; an image; or a pattern as in a shell.
    as_stored: leave images as stored that have an EXIF orientation; by default they are turned upright.

    Logs what a folder holds besides. Raises UserError where there is no image.
    """

    def __init__(self, images, as_stored=False):
        found, left_out = _find_images(images)
        if left_out:
            logging.info("Left out of %s: %s", images, left_out)
        if not found:
            raise UserError(f"{images}: no image{f', but {left_out}' if left_out else ''}; give a folder with images, an image, or a "
                            "pattern in quotes, such as 'photos/*.jpg'"
                            + (" ([ ] in it stand for one of the characters between them)" if "[" in images else ""))
        root = images if os.path.isdir(images) else os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in found])
        self.names = sorted((os.path.relpath(path, root) for path in found), key=natural)
        super().__init__([os.path.join(root, name) for name in self.names], upright=not as_stored)
        self.transform = test_transform()
        self.log_orientations("left as stored (--as_stored)" if as_stored else "turned upright (--as_stored leaves them as stored)")

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        try:
            return super().read(i)
        except UnreadableImage:
            return np.empty((0, 0, 3), np.uint8)  # which a cache keeps, too

    def __getitem__(self, item):
        _, i = item
        pixels = None if self.cache is None else self.cache[i]
        pixels = np.asarray(self.read(i) if pixels is None else pixels)
        if not pixels.size:
            return {"img": torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), "readable": False}
        return {"img": torch.from_numpy(np.array(self.transform(Image.fromarray(pixels)))), "readable": True}

    def problem(self, i):
        """Why image i cannot be read, in words."""
        try:
            super().read(i)
        except UnreadableImage as error:
            return str(error)
        return f"image {self.paths[i]} cannot be read (it could not be before; it has changed)"


def _find_images(images):
    """The image files that a folder, a file or a pattern stands for, and in words what else a folder holds."""
    if os.path.isdir(images):
        files = glob.glob(os.path.join(glob.escape(images), "**", "*"), recursive=True, include_hidden=True)
        kinds = {path: _kind(os.path.relpath(path, images), path) for path in files if not os.path.isdir(path)}
        others = Counter(kind for kind in kinds.values() if kind)
        left_out = ", ".join(f"{n} {kind}{HEIF_ADVICE * (kind in HEIF_EXTENSIONS)}" for kind, n in sorted(others.items()))
        return [path for path, kind in kinds.items() if not kind], left_out and (
            f"{left_out}; a folder is searched for {' '.join(IMAGE_EXTENSIONS)}")
    if os.path.isfile(images):
        return [images], ""
    # Folders that exist are those folders, whatever characters they have.
    folder = os.path.dirname(images)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    pattern = glob.escape(folder) + images[len(folder):] if folder else images
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)], ""


def _kind(name, path):
    """What a file in a folder of images is, in words, unless it is an image of IMAGE_EXTENSIONS. name: its path below the folder."""
    if any(part.startswith(".") for part in name.split(os.sep)):
        return "hidden"
    if not os.path.isfile(path):
        return "broken link" if os.path.islink(path) else "no file"
    return "" if path_is(path, IMAGE_EXTENSIONS) else os.path.splitext(path)[1].lower() or "no extension"


class CameraPoseDataset(_Frames):
    """Items: {'img': 224 x 224 x 3 (uint8), 'pose': 7 numbers (float32), its position relative to `origin`, 'scene': index in
    `scene_names`, -1 if not there, 'row': the frame's row in the label file}. `poses`: all of them, N x 7; `truth`: the same
    as labelled, float64.

    dataset_path: the folder that the label file's image paths are relative to.
    scene_names: the model's scenes in order; by default the label file's, sorted.
    equalize_scenes: an epoch has (frames of the largest scene) x (scenes) items: every frame once, the rest drawn from
        the scenes in proportion to what they lack.
    origin: 3 numbers (float64) of an APR that keeps one; None for the labels' own.

    An item is asked for by its position or by (epoch, position); what is random in it is a function of
    (seed, epoch, position) alone, and a position below the number of rows is that row. Raises UserError for label
    files as `read_labels` does, for a missing image at once, and for an unreadable one when it is reached.
    """

    def __init__(self, dataset_path, labels_file, data_transform=None, equalize_scenes=False, scene_names=None, seed=0,
                 origin=None):
        self.labels_file = labels_file
        self.labels = read_labels(labels_file)
        super().__init__([os.path.join(dataset_path, path) for path in self.labels["img_path"]])
        missing = [f"row {row}: image {path} does not exist" for row, path in zip(self.labels["row"], self.paths)
                   if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{labels_file}: {first_five(missing)}")
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
            frames = np.array([len(rows) for rows in self.rows_of_scenes])
            self.size = frames.max() * len(present)
            lacking = frames.max() - frames
            self.scene_probabilities = lacking / max(lacking.sum(), 1)
        self.log_orientations("taken as stored, as their labels are")

    def move_to(self, origin):
        """Give positions relative to an APR's origin from now on: 3 numbers (float64), or None for the labels' own. Warns where
        it is far from them."""
        self.origin = torch.zeros(3, dtype=torch.double) if origin is None else origin.cpu()
        positions = self.truth[:, :3] - self.origin
        self.poses = torch.cat((positions, self.truth[:, 3:]), dim=1).float()
        centre = far_origin(positions.numpy())
        if centre is not None:
            logging.warning("%s: the positions are about %.3g from the origin of these weights, which know another place, or keep no "
                            "origin (here float32 has steps of %.2g)", self.labels_file, np.linalg.norm(centre),
                            np.spacing(np.abs(centre).max().astype(np.float32)))

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
        except UnreadableImage as error:
            raise UnreadableImage(f"{self.labels_file}: row {self.labels['row'][row]}: {error}") from error

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
    if n_workers and os.path.isdir(OPEN_FILES):
        import resource  # other systems have none

        # Every tensor of a batch on its way is an open file, and so are a worker's pipes.
        free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir(OPEN_FILES))
        n_workers = max(min(n_workers, free // FILES_PER_WORKER), 0)
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
