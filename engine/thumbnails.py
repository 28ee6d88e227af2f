"""Small images of frames, as text that a page of the viewer holds."""
import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from datasets.images import UnreadableImage, is_video, read_image
from datasets.resources import n_cores
from datasets.video import Video
from util.errors import UserError
from util.progress import progress

SIZES = (480, 320, 240, 160, 120, 96, 64)  # of images' longer side, pixels
IMAGE_BYTES = 40e6  # of all images in the page, about
QUALITY = 60  # of JPEG
N_SAMPLED = 16  # images, from which the bytes of all are estimated


def read_thumbnails(folder, names):
    """Small JPEG images of frames, upright, base64 text each, or None where there is none; lines count them.

    They are as large as IMAGE_BYTES allow. names: of images below the folder, or of a video's frames: walk.mp4#000120.
    Raises UserError for a folder without any of them.
    """
    paths = [os.path.join(folder, name) for name in names]
    files = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
    videos = _frames_of_videos(path for path in dict.fromkeys(paths) if not os.path.isfile(path))
    found = {*files, *(path for frames in videos.values() for of_number in frames.values() for path in of_number)}
    if not found:
        raise UserError(f"--dataset_path {folder}: has none of the {len(names)} images, such as {paths[0]}; give the "
                        "folder that img_path is relative to")
    videos = _openable(videos)
    size = _size_for(sum(path in found for path in paths), files, videos)

    def thumbnail(path):
        image = _read(path)
        return image and _jpeg(image, size)

    with progress(total=len(found), desc="images", unit="frame") as bar, ThreadPoolExecutor(n_cores()) as pool:
        read = {}
        for path, image in zip(files, pool.map(thumbnail, files), strict=True):
            read[path] = image
            bar.update()
        for of_number, image in _decoded(videos):
            read.update(dict.fromkeys(of_number, _jpeg(image, size)))
            bar.update(len(of_number))
    images = [read.get(path) for path in paths]
    _count(paths, found, images, size)
    return images


def _size_for(n, files, videos):
    """The largest of SIZES in which n images take IMAGE_BYTES at most, as a sample of them tells."""
    sample = [image for path in files[::-(-len(files) // N_SAMPLED) or 1] if (image := _read(path))]
    sample += [image for _, image in islice(_decoded(videos), N_SAMPLED)]
    bytes_of = {size: n * np.mean([len(_jpeg(image, size)) for image in sample]) if sample else 0 for size in SIZES}
    return next((size for size in SIZES if bytes_of[size] <= IMAGE_BYTES), SIZES[-1])


def _count(paths, found, images, size):
    """Print how many images there are, and how many are not. found: the paths that exist."""
    there = [image for image in images if image]
    for problem, without in (("it does not exist", [path for path in paths if path not in found]),
                             ("it cannot be read", [path for path, image in zip(paths, images, strict=True)
                                                    if path in found and not image])):
        if without:
            print(f"Images: {len(without)} of {len(paths)} shown without a picture: {problem}, such as {without[0]}")
    if there:
        print(f"Images: {len(there)}, at most {size} x {size} pixels, {sum(map(len, there)) / len(there) / 1000:.1f} "
              "kB each on average")


def _frames_of_videos(paths):
    """The frames of videos that exist, among paths such as walk.mp4#000120: {video: {number: their paths}}."""
    videos = {}
    for path in paths:
        video, _, number = path.rpartition("#")
        if is_video(video) and os.path.isfile(video) and number.isdecimal():
            videos.setdefault(video, {}).setdefault(int(number), []).append(path)
    return videos


def _openable(videos):
    """Those of {path: frames} that can be opened, as [(Video, frames)]. Prints why others cannot."""
    opened = []
    for path, frames in videos.items():
        try:
            opened.append((Video(path), frames))
        except UserError as error:
            print(f"Images: {error}")
    return opened


def _decoded(videos):
    """The paths and the PIL image of each frame of `_openable`, in order; fewer where a video ends early."""
    for video, frames in videos:
        last = max(frames)
        for number, _, frame in video:
            if number in frames:
                yield frames[number], video.image(frame)
            if number == last:
                break


def _read(path):
    """An image, upright, or None."""
    try:
        return read_image(path, upright=True)
    except UnreadableImage:
        return None


def _jpeg(image, size):
    """An image as base64 text of a JPEG file with at most size x size pixels."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((size, size))
    small.save(file, "jpeg", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
