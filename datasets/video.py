"""Videos, decoded by PyAV (FFmpeg) frame by frame: as many frames are in memory as are in work."""
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch
from PIL.Image import Transpose

from datasets.image_cache import resize
from datasets.transforms import test_transform
from util import processes
from util.errors import UserError
from util.files import writing
from util.progress import progress

CUT_OFF = 0.5  # seconds before the end that a file names, from which on its frames are said to be missing
# What turns frames upright, by a display matrix's signs (a, b, c, d): the stored pixel x to the right, y down is shown
# a x + c y to the right, b x + d y down.
_UPRIGHT = {(-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT, (-1, 0, 0, -1): Transpose.ROTATE_180,
            (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM, (0, 1, 1, 0): Transpose.TRANSPOSE,
            (0, 1, -1, 0): Transpose.ROTATE_270, (0, -1, -1, 0): Transpose.TRANSVERSE,
            (0, -1, 1, 0): Transpose.ROTATE_90}


class Video:
    """A video file. Iterating decodes it: (number, from 0; presentation time in seconds; frame), frame by frame.

    A frame becomes a PIL image by `image`. Where decoding ends early, `problem` then says so in words; else it is None.
    turn: the PIL transposition that shows frames upright, or None. n_frames: as far as the file tells, else 0.
    """

    def __init__(self, path):
        """Raises UserError for a file without frames that can be decoded, and without PyAV."""
        self.path, self.problem = path, None
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such video; a video is given by its path, one at a time")
        try:
            with _opened(path) as container:
                stream = container.streams.video[0]
                self.rate = float(stream.average_rate or stream.guessed_rate or 30)
                self.end = _end(container, stream, self.rate)
        except _errors() as error:
            raise UserError(f"{path}: cannot be read as a video ({error.strerror}); it is no video, or was cut off "
                            "while it was recorded") from error
        self.n_frames = stream.frames or math.ceil((self.end or 0) * self.rate)
        first = next(iter(self), None)
        if first is None:
            raise UserError(self.problem or f"{path}: no frame in it")
        self.turn = _turn(first[2])

    def __iter__(self):
        self.problem, number, end, why = None, 0, 0, ""
        try:
            with _opened(self.path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in _decoded(container, stream):
                    time = number / self.rate if frame.pts is None else float(frame.pts * stream.time_base)
                    end = time + (float((frame.duration or 0) * stream.time_base) or 1 / self.rate)
                    yield number, time, frame
                    number += 1
        except _errors() as error:
            why = error.strerror
        if not why and self.end is not None and end < self.end - CUT_OFF:
            why = "the file ends"
        if why:
            of = f" of {self.end:.1f}" if self.end else ""
            self.problem = f"video {self.path} cannot be read from frame {number} on, at {end:.1f}{of} s ({why})"

    def image(self, frame, upright=True):
        """A frame that iterating gave, as a PIL image (RGB)."""
        image = frame.to_image()
        return image if self.turn is None or not upright else image.transpose(self.turn)


class VideoFrames:
    """Every N-th frame of a video under the test transform, to be predicted as datasets.unlabelled.Images are.

    names, times: of the frames that `batches` has decoded so far: 'walk.mp4#000120', seconds.
    """

    report_all_unreadable = staticmethod(nullcontext)
    others = "the frames before it"  # that are predicted where one cannot be read

    def __init__(self, path, every=1, as_stored=False):
        """Raises UserError as Video does; logs how frames are turned.

        as_stored: leave frames as stored that the video's metadata say to turn (default: turn them upright).
        """
        self.video, self.every, self.upright = Video(path), every, not as_stored
        self.names, self.times = [], []
        if self.video.turn is not None:
            logging.info("Rotation: %s has one, and its frames are %s", path,
                         "turned upright (--as_stored leaves them as stored)" if self.upright
                         else "left as stored (--as_stored)")

    def __len__(self):
        """The number of frames, as far as the file tells; for progress bars."""
        return -(-self.video.n_frames // self.every)

    def cache_frames(self, cache_dir):
        """Raise UserError: a video is decoded in one pass."""
        raise UserError("--cache_dir keeps the frames of images; leave it out with a video")

    def batches(self, size):
        """This rank's shard of the frames, in order, in batches: {'img': N x 224 x 224 x 3 (uint8), 'readable': N}.

        A thread decodes a batch ahead.
        """
        frames = islice(self._frames(), processes.rank(), None, processes.world_size())
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._batch, frames, size)
            while (batch := ahead.result()) is not None:
                ahead = thread.submit(self._batch, frames, size)
                yield batch

    def problems(self, readable):
        """Why the video could not be read to its end, in words: a list of one, or none."""
        return [self.video.problem] if self.video.problem else []

    def _frames(self):
        """The frames to predict, of all ranks; their names and times go to the lists."""
        for number, time, frame in self.video:
            if number % self.every == 0:
                self.names.append(f"{os.path.basename(self.video.path)}#{number:06d}")
                self.times.append(time)
                yield frame

    def _batch(self, frames, size):
        """The next batch of frames, or None."""
        transform = test_transform()
        images = [np.array(transform(resize(self.video.image(frame, self.upright)))) for frame in islice(frames, size)]
        if not images:
            return None
        return {"img": torch.from_numpy(np.stack(images)), "readable": torch.ones(len(images), dtype=torch.bool)}


def write_photos(path, folder, per_second):
    """Write frames of a video, upright, as JPEG files to a folder, so many per second. Prints how many; returns folder.

    The names have the frames' numbers: walk-000120.jpg. Raises UserError as Video does.
    """
    video, due, n = Video(path), None, 0
    stem = os.path.splitext(os.path.basename(path))[0]
    with writing(folder):
        for number, time, frame in progress(video, total=video.n_frames or None, desc="frames", unit="frame"):
            due = time if due is None else due
            if time >= due - 1e-6:
                video.image(frame).save(os.path.join(folder, f"{stem}-{number:06d}.jpg"), quality=95)
                n += 1
                due += (math.floor((time - due) * per_second + 1e-6) + 1) / per_second
    print(f"{path}: {n} frames taken" + (f"; {video.problem}" if video.problem else ""))
    return folder


def _opened(path):
    """An open container that has a video stream. Raises UserError without PyAV, and for a file of sound alone."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: videos are read by PyAV, which is not installed; pip install av") from error
    # An absolute path is never taken for a URL, and a file that names others by URLs does not reach them.
    container = av.open(os.path.abspath(path), options={"protocol_whitelist": "file"})
    if not container.streams.video:
        held = ", ".join(stream.type for stream in container.streams)
        container.close()
        raise UserError(f"{path}: holds no video, only {held or 'nothing'}")
    return container


def _errors():
    """The exceptions of PyAV, which are none without it."""
    try:
        import av
    except ImportError:
        return ()
    return (av.FFmpegError,)


def _decoded(container, stream):
    """The frames of a stream. Raises av.FFmpegError before the first damaged one."""
    import av

    def packets():
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise damaged
            yield packet

    def frames():
        try:
            for packet in packets():
                yield from stream.codec_context.decode(packet)
        except av.FFmpegError:
            yield from stream.codec_context.decode(None)  # what the decoder holds already
            raise

    damaged = av.error.InvalidDataError(0, "damaged data")
    for frame in frames():
        if frame.is_corrupt:
            raise damaged
        yield frame


def _end(container, stream, rate):
    """The time in seconds at which a stream ends, as its file says, or None. rate: its frames per second."""
    if container.format.name == "avi" and stream.frames:  # FFmpeg shortens the duration to what the file has
        return stream.frames / rate
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start + float(stream.duration * stream.time_base)
    if "DURATION" in stream.metadata:  # Matroska's: 00:01:02.345000000
        hours, minutes, seconds = map(float, stream.metadata["DURATION"].split(":"))
        return 3600 * hours + 60 * minutes + seconds
    alone = len(container.streams) == 1  # the sound may be longer
    return container.duration / 1e6 if container.duration and alone else None


def _turn(frame):
    """What shows a frame upright, as its display matrix says, rounded to right angles: a PIL transposition or None."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return None
    linear = np.frombuffer(bytes(matrix), np.int32)[[0, 1, 3, 4]]
    return _UPRIGHT.get(tuple(np.round(linear / max(abs(linear).max(), 1)).astype(int).tolist()))
