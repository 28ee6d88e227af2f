"""The first frames of a label file, decoded by another process while this one loads PyTorch.

Loading keeps one core busy for a second or two, in which each other core decodes some hundred frames.
"""
import logging
import mmap
import multiprocessing
import os
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.frames import image_paths
from datasets.image_cache import ROW, ImageCache, read_frame, signature_of
from datasets.labels import read_labels
from datasets.resources import free_memory, n_cores
from util import processes, signals

MEMORY = 1 << 28  # bytes of pixels at most: 1,000 frames of 4:3
N_FRAMES = 1 << 12  # at most, however small


def decode_ahead(dataset_path, labels_file):
    """Begin to decode the frames of a label file in its order, where a core is free for it.

    Returns a function that ends it: paths -> an ImageCache of their first ones, as many as are decoded; or None where
    none is, or where they are not the label file's images. A frame that cannot be read, or not without a warning, ends
    it, too: whoever needs that frame reads it and says so.
    """
    possible = sys.platform == "linux" and n_cores() > 1 and not processes.under_torchrun()
    if not possible or not os.path.isfile(labels_file) or free_memory() < 4 * MEMORY:  # a pipe can be read only once
        return lambda paths: None
    try:
        # Anonymous mappings, which a forked process shares: the frames' number and the checksum of their paths, what
        # is known of each, and their pixels.
        header, rows, pixels = (np.frombuffer(mmap.mmap(-1, n * np.dtype(kind).itemsize), kind)
                                for n, kind in ((2, np.int64), (N_FRAMES, ROW), (MEMORY, np.uint8)))
        process = multiprocessing.get_context("fork").Process(
            target=_decode, args=(dataset_path, labels_file, header, rows, pixels), daemon=True)
        with signals.held():
            process.start()
    except OSError:  # no memory, or no more processes
        return lambda paths: None

    def end(paths):
        process.kill()
        process.join()
        n_decoded, checksum = header.tolist()
        return ImageCache(paths, rows[:n_decoded], pixels) if n_decoded and checksum == _checksum(paths) else None

    return end


def _decode(dataset_path, labels_file, header, rows, pixels):
    """Decode frames into shared memory until it is full, something is unusual, or the other process has ended."""
    signals.handled_by_system()
    logging.disable()  # the other process reads the same labels, and logs it
    try:
        paths = image_paths(dataset_path, read_labels(labels_file))
        header[1] = _checksum(paths)
        _let_warnings_raise()
        begin, n_threads = 0, n_cores() - 1
        with ThreadPoolExecutor(n_threads) as pool:
            for i in range(0, min(len(paths), N_FRAMES), n_threads):
                for signature, frame in pool.map(_signed_frame, paths[i:i + n_threads]):
                    if begin + frame.size > len(pixels) or os.getppid() != multiprocessing.parent_process().pid:
                        return
                    pixels[begin:begin + frame.size] = frame.ravel()
                    rows[header[0]] = (*signature, *frame.shape[:2])
                    begin += frame.size
                    header[0] += 1
    except Exception:  # the other process meets it where it needs that frame
        return


def _signed_frame(path):
    """What `signature_of` an image file tells, and its pixels as `read_frame` gives them."""
    signature = signature_of(path)  # before the pixels, so that a change in between shows
    return signature, np.asarray(read_frame(path))


def _let_warnings_raise():
    """Let this process raise an exception where it would print or log a warning."""
    def refuse(record):
        raise RuntimeError(record.getMessage())

    handler = logging.Handler(logging.WARNING)
    handler.emit = refuse
    logging.getLogger().handlers = [handler]
    logging.disable(logging.NOTSET)
    warnings.simplefilter("error")


def _checksum(paths):
    return zlib.crc32(os.fsencode("\n".join(paths)))
