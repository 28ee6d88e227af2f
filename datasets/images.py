"""Images of any kind as 8-bit RGB, and the orientation that cameras store beside the pixels (EXIF).

The pixels are those that scikit-image reads, as in the published code: as they are stored. Where they are palettes,
CMYK or several frames, Pillow makes RGB of the first.
"""
import contextlib
import os
import struct

import numpy as np
import skimage.util
import tifffile
from PIL import ExifTags, Image, features

from util.errors import UserError

try:
    import pillow_heif
except ImportError:
    HAS_HEIF = False
else:
    HAS_HEIF = True
    pillow_heif.register_heif_opener()

HEIF_EXTENSIONS = (".heic", ".heif")
HEIF_ADVICE = "" if HAS_HEIF else " (pip install pillow-heif reads them)"
# A folder is searched for images with these extensions, which can be read here.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
                    *((".avif",) if features.check("avif") else ()), *(HEIF_EXTENSIONS if HAS_HEIF else ()))
VIDEO_EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
# Pillow's modes of images that are read unchanged.
_STORED = ("1", "L", "LA", "RGB", "RGBA", "I;16", "I;16L", "I;16B", "I", "F")
# What turns an image upright, by the value of the tag.
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}
_TURNED_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class UnreadableImage(UserError):
    """An image file that cannot be read."""


def read_image(path, upright=False):
    """An image as 8-bit RGB (PIL).

    Greyscale is repeated, transparency is dropped, 16 bits and floats are scaled to 8 bits.
    upright: turn it as its EXIF orientation says (default: leave the pixels as stored).

    Raises UnreadableImage for an image that cannot be read, and for numbers whose range does not tell white's value.
    """
    try:
        image = Image.fromarray(_eight_bits(path, _pixels(path)))
        orientation = read_header(path)[2] if upright else 1
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise any type, and the file is at fault
        raise UnreadableImage(f"image {path} cannot be read ({error})") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def read_header(path):
    """(height, width, EXIF orientation) of an image as stored, without decoding it.

    The orientation is 1 to 8, and 1 for none. The result is (0, 0, 1) for a file that cannot be read; that is reported
    when it is decoded.
    """
    try:
        if _is_tiff(path):
            with tifffile.TiffFile(path) as file:
                page = file.pages[0]
                tag = page.tags.get(ExifTags.Base.Orientation)
                return page.imagelength, page.imagewidth, _known(tag.value if tag else 1)
        with Image.open(path) as image:
            if image.format == "PNG":  # Pillow would decode the pixels, to look for the tag behind them
                exif = Image.Image.getexif(image)
                if not exif:
                    exif.load(_exif_of_png(path))
            else:
                exif = image.getexif()
            return image.height, image.width, _known(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # decoders raise any type
        return 0, 0, 1


def _known(orientation):
    """A valid EXIF orientation, or 1."""
    return int(orientation) if orientation in _UPRIGHT else 1


def _is_tiff(path):
    """Whether a file's content is TIFF, whatever its name."""
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def path_is(path, extensions):
    """Whether a path has one of the extensions, in upper or lower case."""
    return os.path.splitext(path)[1].lower() in extensions


def is_video(path):
    """Whether a path is that of a video, by its extension."""
    return path_is(path, VIDEO_EXTENSIONS) and not os.path.isdir(path)


def _pixels(path):
    """An image's numbers: H x W or H x W x channels."""
    if _is_tiff(path):
        # It does not support every compression.
        with contextlib.suppress(ValueError, ImportError), tifffile.TiffFile(path) as file:
            page = file.pages[0]
            if page.photometric.name in ("MINISBLACK", "RGB") and len(file.pages) == 1:
                pixels = page.asarray()
                in_planes = pixels.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
                return np.moveaxis(pixels, 0, 2) if in_planes else pixels
    return _pillow_pixels(path)  # of TIFF: palettes, CMYK, YCbCr, white at 0, and the first of several pages


def _pillow_pixels(path):
    """An image's numbers as stored, read by Pillow: H x W or H x W x channels."""
    with Image.open(path) as image:
        # Pillow turns TIFF images upright.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 1
        image.load()
        stored = image if image.mode in _STORED else image.convert("RGB")
        has_16_bits = image.format in ("PNG", "PPM") and image.mode == "I"  # in PPM scaled to 65535
    pixels = np.asarray(stored.transpose(_TURNED_BACK[orientation]) if orientation in _TURNED_BACK else stored)
    return pixels.astype(np.uint16) if has_16_bits else pixels


def _eight_bits(path, pixels):
    """Pixels as H x W x 3 uint8."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., [0] * 3]
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.uint16:
        return skimage.util.img_as_ubyte(pixels / 65535)  # rounds; whole numbers would be truncated
    if pixels.dtype == bool:
        return skimage.util.img_as_ubyte(pixels)
    # Floats and long whole numbers: their range tells the value of white.
    low, high = (float(value) for value in (pixels.min(), pixels.max()))
    white = next((white for white in (1, 255, 65535) if high <= white), 0)
    # An image whose largest number is far below white is rarer than one with another range, such as 1.2 or 12 bits.
    if not 0 <= low <= high <= white or (white > 1 and high < white / 16):
        raise UnreadableImage(f"image {path} cannot be read ({pixels.dtype} numbers from {low:.6g} to {high:.6g} do "
                              "not tell the value of white); save it with 8 or 16 bits, or with numbers from 0 to 1, "
                              "255 or 65535")
    return skimage.util.img_as_ubyte(pixels / np.float64(white))


def _exif_of_png(path):
    """The EXIF data of a PNG file, b"" for none. The chunks' lengths and names are read, not the pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"eXIf":
                return b"Exif\0\0" + file.read(length)
            file.seek(length + 4, os.SEEK_CUR)
    return b""
