"""A user's own images, without labels."""
import glob
import logging
import os
import sys
from collections import Counter

import numpy as np
from PIL import Image

from datasets.frames import Frames
from datasets.images import HEIF_ADVICE, HEIF_EXTENSIONS, IMAGE_EXTENSIONS, UnreadableImage, path_is
from datasets.labels import natural_key
from util import processes
from util.errors import UserError, first_five


class Images(Frames):
    """Images under the test transform. `names`: their paths below the folder that holds them all.

    Items: {'img': 224 x 224 x 3 (uint8), 'readable': whether the image could be read; otherwise 'img' is black},
    indexed as those of CameraPoseDataset.
    """

    times = None  # images have none; the frames of a video have
    others = "the other images"  # that are predicted where some cannot be read

    def __init__(self, images, as_stored=False):
        """Find the images. Raises UserError where there is none; logs what else a folder holds.

        images: a folder, which is searched with its subfolders; an image; a pattern as in a shell; or -, a list on
            standard input.
        as_stored: leave images with an EXIF orientation as stored (default: turn them upright).
        """
        self.names, root = self._find(images)
        super().__init__([os.path.join(root, name) for name in self.names], upright=not as_stored)
        self.log_orientations("left as stored (--as_stored)" if as_stored
                              else "turned upright (--as_stored leaves them as stored)")

    def _find(self, images):
        """The names of images, in natural order or as listed, and the folder that holds them all."""
        if images == "-":
            found = read_list()
            root = folder_of(images, found)
            return [os.path.relpath(path, root) for path in found], root
        found, left_out = find_images(images)
        if left_out:
            logging.info("Left out of %s: %s", images, left_out)
        if not found:
            brackets = " ([ ] in it stand for one of the characters between them)" if "[" in images else ""
            raise UserError(f"{images}: no image{f', but {left_out}' if left_out else ''}; give a folder with images, "
                            f"an image, or a pattern in quotes, such as 'photos/*.jpg'{brackets}")
        root = folder_of(images, found)
        return sorted((os.path.relpath(path, root) for path in found), key=natural_key), root

    def __len__(self):
        """The number of images."""
        return len(self.paths)

    def read(self, i):
        """Image i, decoded now: a PIL image with a shorter side of 256, or an array of no pixels if unreadable."""
        try:
            return super().read(i)
        except UnreadableImage:
            return np.empty((0, 0, 3), np.uint8)  # which a cache keeps, too

    def __getitem__(self, item):
        """The item at (epoch, position); see the class."""
        import torch  # here, since predictions by an ONNX file do without

        from datasets.transforms import SIZE, test_transform

        _, i = item
        pixels = None if self.cache is None else self.cache[i]
        pixels = np.asarray(self.read(i) if pixels is None else pixels)
        if not pixels.size:
            return {"img": torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), "readable": False}
        return {"img": torch.from_numpy(np.array(test_transform()(Image.fromarray(pixels)))), "readable": True}

    def problems(self, readable):
        """Why the images that could not be read are unreadable, in words: a list. readable: of all images."""
        return [self._why(i) for i in np.flatnonzero(~np.asarray(readable))]

    def _why(self, i):
        try:
            super().read(i)
        except UnreadableImage as error:
            return str(error)
        return f"image {self.paths[i]} cannot be read (it could not be before; it has changed)"


def read_list():
    """The paths on standard input, one per line. Raises UserError for none, and for lines that are no file."""
    text = os.fsdecode(sys.stdin.buffer.read()) if processes.rank() == 0 else None
    lines = [line.removesuffix("\r") for line in processes.broadcast(text).split("\n")]
    missing = [f"line {i}: no file '{line}'" for i, line in enumerate(lines, start=1)
               if line and not os.path.isfile(line)]
    if missing:
        raise UserError(f"standard input: {first_five(missing)}")
    if not any(lines):
        raise UserError("standard input: no image; give paths of images, one per line")
    return [line for line in lines if line]


def find_images(images):
    """The image files of a folder, a file or a pattern, and in words what else a folder holds ('' for nothing)."""
    if os.path.isdir(images):
        files = glob.glob(os.path.join(glob.escape(images), "**", "*"), recursive=True, include_hidden=True)
        kinds = {path: _other_kind(os.path.relpath(path, images), path) for path in files if not os.path.isdir(path)}
        others = Counter(kind for kind in kinds.values() if kind)
        left_out = ", ".join(f"{n} {kind}{HEIF_ADVICE * (kind in HEIF_EXTENSIONS)}"
                             for kind, n in sorted(others.items()))
        if left_out:
            left_out += f"; a folder is searched for {' '.join(IMAGE_EXTENSIONS)}"
        return [path for path, kind in kinds.items() if not kind], left_out
    if os.path.isfile(images):
        return [images], ""
    # The longest path of folders that exist is taken literally, whatever characters it has.
    folder = os.path.dirname(images)
    while folder and not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    pattern = glob.escape(folder) + images[len(folder):] if folder else images
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)], ""


def folder_of(images, found):
    """The folder that holds all images: the given one, or the deepest above the files that `find_images` found."""
    if os.path.isdir(images):
        return images
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in found])


def _other_kind(name, path):
    """What a file in a folder of images is, in words; '' for an image. name: its path below the folder."""
    if any(part.startswith(".") for part in name.split(os.sep)):
        return "hidden"
    if not os.path.isfile(path):
        return "broken link" if os.path.islink(path) else "no file"
    return "" if path_is(path, IMAGE_EXTENSIONS) else os.path.splitext(path)[1].lower() or "no extension"
