"""The first frames of a label file, decoded by another process while this one loads PyTorch.

Loading keeps one core busy for a second or two, in which each other core decodes some hundred frames.
"""
import logging
import mmap
import multiprocessing
import signal
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.frames import image_paths
from datasets.image_cache import ROWS, ImageCache, read_frame, signature_of
from datasets.images import UnreadableImage
from datasets.labels import read_labels
from datasets.resources import free_memory, n_cores
from util import processes
from util.errors import UserError

MEMORY = 1 << 28  # bytes of pixels at most: 1,000 frames of 4:3
N_FRAMES = 1 << 12  # at most, however small


def decode_ahead(dataset_path, labels_file):
    """Begin to decode the frames of a label file in its order, where a core is free for it.

    Returns a function that ends it: paths -> an ImageCache of their first ones, or None where they are not the label
    file's images. What cannot be read ends it, too; whoever needs that reports it.
    """
    if sys.platform != "linux" or n_cores() == 1 or processes.under_torchrun() or free_memory() < 4 * MEMORY:
        return lambda paths: None
    # Anonymous mappings, which a forked process shares.
    counts, table, pixels = (mmap.mmap(-1, size) for size in (16, N_FRAMES * ROWS.itemsize, MEMORY))
    counts, rows, pixels = np.frombuffer(counts, np.int64), np.frombuffer(table, ROWS), np.frombuffer(pixels, np.uint8)
    process = multiprocessing.get_context("fork").Process(
        target=_decode, args=(dataset_path, labels_file, counts, rows, pixels), daemon=True)
    process.start()

    def end(paths):
        process.kill()
        process.join()
        n_decoded, checksum = counts.tolist()
        if checksum != _checksum(paths):
            return None
        return ImageCache(paths, rows[:n_decoded], pixels)

    return end


def _decode(dataset_path, labels_file, counts, rows, pixels):
    """Decode frames into shared memory until it is full, and count those that are whole."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for the process that began this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable()  # the other process reads the same, and logs it

    def decode(path):
        signature = signature_of(path)  # before the pixels, so that a change in between shows
        return signature, np.asarray(read_frame(path))

    try:
        paths = image_paths(dataset_path, read_labels(labels_file))
        counts[1] = _checksum(paths)
        end = 0
        n_threads = n_cores() - 1
        with ThreadPoolExecutor(n_threads) as pool:
            for begin in range(0, min(len(paths), N_FRAMES), n_threads):
                for signature, frame in pool.map(decode, paths[begin:begin + n_threads]):
                    if end + frame.size > len(pixels):
                        return
                    pixels[end:end + frame.size] = frame.ravel()
                    rows[counts[0]] = (*signature, *frame.shape[:2])
                    end += frame.size
                    counts[0] += 1
    except (UserError, UnreadableImage):
        pass


def _checksum(paths):
    return zlib.crc32("\n".join(paths).encode())
