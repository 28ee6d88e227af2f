"""Image files as a dataset's frames, decoded once where they are cached."""
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from PIL import Image

from datasets.image_cache import cache_in_file, cache_in_memory, read_frame
from datasets.images import UnreadableImage, read_header
from datasets.resources import free_memory, n_cores
from util import processes
from util.errors import UserError, first_five
from util.progress import progress


class Frames:
    """Image files, resized as the published transforms resize them. Loads no PyTorch: PIL images alone."""

    def __init__(self, paths, upright=False):
        """paths: the image files. upright: turn them as their EXIF orientation says."""
        self.paths, self.upright = paths, upright
        self.cache = None

    def log_orientations(self, treatment):
        """Log how many images have an EXIF orientation, and their treatment, in words. Without any, log nothing."""
        with ThreadPoolExecutor(n_cores()) as pool:
            turned = sum(orientation > 1 for *_, orientation in pool.map(read_header, self.paths))
        if turned:
            logging.info("EXIF orientation: %d of %d images have one, and are %s", turned, len(self.paths), treatment)

    def cache_frames(self, cache_dir=None, memory_gb=None):
        """Decode every frame once, now; the items stay the same. Raises UserError for unreadable images.

        Frames go to a file of `cache_dir`. Without it they go to memory, at most `memory_gb` GB (default: a quarter of
        the free memory), which the run's processes on one machine share.
        """
        n_threads = n_cores()
        with self.report_all_unreadable():
            if cache_dir:
                kind = "upright" if self.upright else "as stored"
                if processes.local_rank() > 0:
                    processes.barrier()  # while the machine's first process decodes; the others find the file
                self.cache = cache_in_file(cache_dir, self.paths, self.read, n_threads, kind)
                if processes.local_rank() == 0:
                    processes.barrier()
            else:
                memory = free_memory() // 4 if memory_gb is None else int(memory_gb * 1e9)
                budget = memory // processes.local_world_size()
                self.cache = cache_in_memory(self.paths, self.read, n_threads, budget)

    @contextmanager
    def report_all_unreadable(self):
        """Within the block, an unreadable image becomes a UserError that counts all of them: every image is decoded."""
        try:
            yield
        except UnreadableImage:
            with ThreadPoolExecutor(n_cores()) as pool:
                found = progress(pool.map(self._problem, range(len(self.paths))), total=len(self.paths), desc="reading",
                                 unit="frame")
                problems = [text for text in found if text]
            if len(problems) > 1:
                raise UserError(first_five(problems)) from None
            raise

    def _problem(self, i):
        """Why frame i cannot be read, in words, or None."""
        try:
            self.read(i)
        except UnreadableImage as error:
            return str(error)
        return None

    def read(self, i):
        """Frame i, decoded now: a PIL image with a shorter side of 256. Raises UnreadableImage."""
        return read_frame(self.paths[i], self.upright)

    def frame(self, i):
        """Frame i, cached or decoded now: a PIL image with a shorter side of 256. Raises UnreadableImage."""
        pixels = None if self.cache is None else self.cache[i]
        return self.read(i) if pixels is None else Image.fromarray(pixels)


def image_paths(dataset_path, labels):
    """The image files of the rows of `read_labels`: a list."""
    return [os.path.join(dataset_path, path) for path in labels["img_path"]]
