"""Frames decoded and resized once, in memory or in a file.

The published transforms resize before anything random. So what follows can start from stored 8-bit pixels, with equal
results.
"""
import hashlib
import logging
import mmap
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from datasets.images import read_header, read_image
from util.errors import UserError
from util.files import whole_file
from util.progress import progress

SHORTER_SIDE = 256
# A file of frames has the pixels of all frames, one such row per frame, the rows' CRC-32 and the mark.
ROW = np.dtype([("modified_ns", "<i8"), ("n_bytes", "<i8"), ("height", "<i4"), ("width", "<i4")])
_MARK = b"frames 2"
_CHUNK = 64  # frames decoded before they are written, so that memory stays small


class ImageCache:
    """Decoded frames: cache[i] is frame i."""

    def __init__(self, paths, rows, pixels):
        """paths: the image files. rows: of the cached frames, the first ones, as ROW. pixels: theirs, flat."""
        self.paths, self.pixels = paths, pixels
        self.signatures = list(zip(rows["modified_ns"].tolist(), rows["n_bytes"].tolist(), strict=True))
        self.shapes = list(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True))
        self.ends = np.cumsum([height * width * 3 for height, width in self.shapes]).tolist()

    def __getitem__(self, i):
        """Frame i resized, h x w x 3 uint8, or None where it is not cached or its file has changed since."""
        if i >= len(self.shapes) or signature_of(self.paths[i]) != self.signatures[i]:
            return None
        height, width = self.shapes[i]
        return self.pixels[self.ends[i] - height * width * 3:self.ends[i]].reshape(height, width, 3)


def cache_in_memory(paths, read, n_threads, budget):
    """Decode frames into memory that forked workers share: an anonymous mapping, which needs no /dev/shm.

    read: i -> frame i as `read_frame` returns it. budget: bytes; as many of the first frames as fit are kept. Returns
    an ImageCache, or None where nothing fits.
    """
    with ThreadPoolExecutor(n_threads) as pool:
        shapes = list(pool.map(_resized_shape, paths))
    ends = np.cumsum([height * width * 3 for height, width in shapes])
    n_kept = int(np.searchsorted(ends, budget, side="right"))
    if n_kept < len(paths):
        logging.info("Frames kept in memory: %d of %d, as many as fit into %.2f GB (cache_memory_gb; by default a "
                     "quarter of what is free); --cache_dir keeps all of them in a file",
                     n_kept, len(paths), budget / 1e9)
    if n_kept == 0 or ends[n_kept - 1] == 0:
        return None
    try:
        buffer = mmap.mmap(-1, int(ends[n_kept - 1]))
    except OSError as error:
        raise UserError(f"{ends[n_kept - 1] / 1e9:.2f} GB of memory for decoded frames are not available "
                        f"({error.strerror}); set cache_memory_gb to less, or give --cache_dir") from error
    rows = np.zeros(n_kept, ROW)
    for i, (signature, pixels) in enumerate(_decode(paths[:n_kept], read, n_threads)):
        if pixels.shape[:2] != shapes[i]:
            raise UserError(f"image {paths[i]} changed while it was read; run again")
        buffer.write(pixels)
        rows[i] = (*signature, *shapes[i])
    return ImageCache(paths, rows, np.frombuffer(buffer, np.uint8))


def cache_in_file(cache_dir, paths, read, n_threads, kind):
    """Decode frames into a file of `cache_dir`, or take the one that exists. Returns an ImageCache that maps the file.

    Frames whose image files have changed are decoded again. Several runs can share the file.
    kind: what `read` does with the frames, in words; each kind has its own file. Raises UserError where the file cannot
    be written.
    """
    identity = "\n".join([_MARK.decode(), kind, str(SHORTER_SIDE), *map(os.path.abspath, paths)])
    path = os.path.join(cache_dir, hashlib.sha256(identity.encode()).hexdigest()[:16] + ".frames")
    cache = _open(path, paths)
    n_stale = len(paths) if cache is None else sum(cache[i] is None for i in range(len(paths)))
    if n_stale:
        logging.info("Decoding %d of %d frames into %s", n_stale, len(paths), path)
        rows = np.zeros(len(paths), ROW)

        def read_or_keep(i):
            kept = None if cache is None else cache[i]
            return read(i) if kept is None else kept

        with whole_file(path, "wb") as file:
            for i, (signature, pixels) in enumerate(_decode(paths, read_or_keep, n_threads)):
                file.write(pixels)
                rows[i] = (*signature, *pixels.shape[:2])
            file.write(rows.tobytes() + zlib.crc32(rows.tobytes()).to_bytes(4, "little") + _MARK)
        cache = _open(path, paths)
    logging.info("Frames come from %s", path)
    return cache


def read_frame(path, upright=False):
    """An image as the published transforms resize it: PIL, 8-bit RGB, shorter side 256.

    upright: as for `read_image`. Raises UnreadableImage.
    """
    return resize(read_image(path, upright))


def resize(image):
    """A PIL image with a shorter side of 256, as torchvision's Resize, without loading PyTorch."""
    height, width = resized_shape(image.height, image.width)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def resized_shape(height, width):
    """(height, width) of an image after `resize`: the longer side is rounded down."""
    longer = int(SHORTER_SIDE * max(width, height) / min(width, height))
    return (SHORTER_SIDE, longer) if height <= width else (longer, SHORTER_SIDE)


def _decode(paths, read, n_threads):
    """The signature and the pixels of each frame in order, decoded by threads (the decoders release Python's lock)."""
    def decode(i):
        signature = signature_of(paths[i])  # before the pixels, so that a change in between shows
        return signature, np.asarray(read(i))

    with ThreadPoolExecutor(n_threads) as pool, progress(total=len(paths), desc="decoding", unit="frame") as bar:
        for begin in range(0, len(paths), _CHUNK):
            for decoded in pool.map(decode, range(begin, min(begin + _CHUNK, len(paths)))):
                yield decoded
                bar.update()


def _open(path, paths):
    """The cache in a file, or None where the file does not exist or is damaged."""
    if not os.path.exists(path):
        return None
    try:
        data = np.memmap(path, np.uint8, mode="r")
        end = len(data) - len(_MARK) - 4
        rows_begin = end - len(paths) * ROW.itemsize
        if rows_begin < 0 or data[end + 4:].tobytes() != _MARK:
            raise ValueError
        packed = data[rows_begin:end].tobytes()
        if zlib.crc32(packed).to_bytes(4, "little") != data[end:end + 4].tobytes():
            raise ValueError
        cache = ImageCache(paths, np.frombuffer(packed, ROW), data)
        if cache.ends[-1] != rows_begin:
            raise ValueError
        return cache
    except (OSError, ValueError):
        logging.info("%s is damaged: its frames are decoded again", path)
        return None


def signature_of(path):
    """(modification time in ns, size in bytes) of a file, which change when the file does; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _resized_shape(path):
    """(height, width) of a resized frame, as stored, from the file's header alone.

    The result is (0, 0) for a file that cannot be read; that is reported when it is decoded.
    """
    height, width, _ = read_header(path)
    return resized_shape(height, width) if height else (0, 0)
