"""Label files of your own photos: COLMAP, by pycolmap, computes where each was taken. It needs no GPU.

    python -m datasets.prepare_photos PHOTOS OUT [--name attic] [--every N]
                                      [--scale_by IMG_A IMG_B METRES | --scale_by_gps] [--fps F]

PHOTOS is a folder, a pattern in quotes, or a video, of which two frames per second are taken (--fps). OUT gets the
photos, upright, in OUT/images, COLMAP's model of them in OUT/sparse, and the label files <name>_train.csv and
<name>_test.csv, whose images are relative to OUT/images. An existing model in OUT is used again.
"""
import argparse
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
import pycolmap  # here, since it takes SIGTERM when it is imported, and cli.run then takes it back
from PIL import ExifTags, Image

from datasets.images import UnreadableImage, is_video, path_is, read_header, read_image
from datasets.labels import natural_key
from datasets.preparation import (
    add_scale_by,
    add_split,
    check_scene_name,
    label_table,
    metres_of,
    print_next_commands,
    scale_between,
    scaled,
    split_every,
    split_stretches,
    write_scene,
)
from datasets.prepare_colmap import find_model, read_model
from datasets.resources import n_cores
from datasets.unlabelled import find_images, folder_of
from datasets.video import write_photos
from util import cli
from util.errors import UserError, first_five
from util.files import writing
from util.progress import progress

MAX_EXHAUSTIVE = 300  # photos of which every pair is matched: 45 000 pairs
OVERLAP = 10  # of more photos: each is matched with so many that follow it, and every tenth with every tenth
PAIRS_AT_ONCE = 500  # between two steps of the progress bar
MAX_SIZE = 1600  # pixels of the longer side for features: a 12-megapixel photo as it is takes 1 GB per thread
JPEG, PNG = (".jpg", ".jpeg"), (".png",)
MIN_GPS = 3  # photos with a GPS position, to scale by them


def find_photos(photos, out):
    """The photos of a folder or pattern: {name below OUT/images: path}, in the order of names; and the rest in words.

    A photo has its path below the folder that holds them all; of a kind other than JPEG and PNG, with the extension
    .jpg. Raises UserError where there is none, where two would have one name, and where OUT is among them.
    """
    found, left_out = find_images(photos)
    if not found:
        raise UserError(f"{photos}: no photo{f', but {left_out}' if left_out else ''}; give a folder with photos, or a "
                        f"pattern in quotes, such as 'photos/*.jpg'")
    root = folder_of(photos, found)
    folder = Path(out).resolve()
    if (os.path.isdir(photos) and folder.is_relative_to(Path(photos).resolve())) or any(
            Path(path).resolve().is_relative_to(folder) for path in found):
        raise UserError(f"{out}: lies among the photos of {photos}; name a folder outside, which gets copies of them")
    named, problems = {}, []
    for path in sorted(found, key=natural_key):
        name = Path(os.path.relpath(path, root))
        name = (name if path_is(path, JPEG + PNG) else name.with_suffix(".jpg")).as_posix()
        if name in named:
            problems.append(f"{path} and {named[name]} would both be {name}; keep one of them")
        named[name] = path
    if problems:
        raise UserError(first_five(problems))
    return {name: named[name] for name in sorted(named, key=natural_key)}, left_out


def write_upright(photo, target):
    """Write a photo upright. A file that is upright already is copied. Raises UnreadableImage.

    EXIF data stay, without the orientation: COLMAP begins with the focal length in them.
    """
    image = read_image(photo, upright=True)  # decodes it, whatever is then written
    with Image.open(photo) as stored:
        as_is = stored.mode in ("L", "RGB") and (stored.format in ("JPEG", "MPO") and path_is(target, JPEG)
                                                 or stored.format == "PNG" and path_is(target, PNG))
        exif = stored.getexif()
    target.parent.mkdir(parents=True, exist_ok=True)
    if as_is and read_header(photo)[2] == 1:
        shutil.copyfile(photo, target)
        return
    exif.pop(ExifTags.Base.Orientation, None)
    try:
        exif = exif.tobytes()
    except Exception:  # of any type, for values that the standard does not allow; pixels do not depend on them
        exif = b""
    image.save(target, quality=95, exif=exif)


def write_all_upright(photos, folder):
    """Write photos, {name: path}, upright to a folder. Raises UserError that counts the unreadable ones."""
    def problem(name):
        try:
            write_upright(photos[name], folder / name)
        except UnreadableImage as error:
            return str(error)
        return None

    with writing(folder), ThreadPoolExecutor(n_cores()) as pool:
        problems = [text for text in progress(pool.map(problem, photos), total=len(photos), desc="photos", unit="photo")
                    if text]
    if problems:
        raise UserError(f"{first_five(problems)}; remove such files from the photos")


def camera_of(path):
    """What tells the camera that took a photo: its size in pixels, the make and model, and the focal length.

    Photos of one camera share its parameters in COLMAP, which then are better determined than one by one. A photo of
    another size, or with another zoom, has others.
    """
    with Image.open(path) as image:
        exif = image.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        return (*image.size, *(str(exif.get(tag)) for tag in (ExifTags.Base.Make, ExifTags.Base.Model)),
                *(str(details.get(tag)) for tag in (ExifTags.Base.FocalLength, ExifTags.Base.FocalLengthIn35mmFilm)))


def pairs_to_match(n):
    """The pairs of n photos, in the order of names, whose features are matched: a sorted list of (i, j), i < j."""
    if n <= MAX_EXHAUSTIVE:
        return list(combinations(range(n), 2))
    neighbours = {(i, j) for i in range(n) for j in range(i + 1, min(i + OVERLAP + 1, n))}
    # Where a walk comes back to a place, or another walk to it, far apart in the order of names.
    return sorted(neighbours | set(combinations(range(0, n, OVERLAP), 2)))


def extract_features(database, images, cameras):
    """Write the features of images to COLMAP's database, with a bar. cameras: for each a list of its images' names."""
    options = pycolmap.FeatureExtractionOptions(max_image_size=MAX_SIZE, num_threads=n_cores(), use_gpu=False)
    at_once = 4 * n_cores()  # COLMAP reports nothing within a call
    with progress(total=sum(map(len, cameras)), desc="features", unit="photo") as bar:
        for camera_id, names in enumerate(cameras, start=1):
            for start in range(0, len(names), at_once):
                reader = pycolmap.ImageReaderOptions(existing_camera_id=camera_id if start else -1)  # -1: a new one
                part = names[start:start + at_once]
                pycolmap.extract_features(database, images, part, pycolmap.CameraMode.SINGLE, reader, options,
                                          device=pycolmap.Device.cpu)
                bar.update(len(part))


def match_features(database, file, pairs):
    """Match features in COLMAP's database, with a bar. pairs: of images' names. file: for COLMAP to read them from."""
    options = pycolmap.FeatureMatchingOptions(num_threads=n_cores(), use_gpu=False)
    with progress(total=len(pairs), desc="matches", unit="pair") as bar:
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start:start + PAIRS_AT_ONCE]
            file.write_text("".join(f"{first} {second}\n" for first, second in part))
            pycolmap.match_image_pairs(database, options, pycolmap.ImportedPairingOptions(match_list_path=file),
                                       device=pycolmap.Device.cpu)
            bar.update(len(part))


def compute_models(images, names, folder):
    """COLMAP's models of images: a list of pycolmap.Reconstruction, the largest first.

    images: their folder. names: in it, in the order to match them. folder: for COLMAP's own files.
    """
    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.FATAL)  # models and exceptions say all that matters
    pycolmap.set_random_seed(0)
    # COLMAP separates names by spaces where it reads pairs: it gets links without any.
    links = {f"{i:06d}{Path(name).suffix}": name for i, name in enumerate(names)}
    (folder / "links").mkdir()
    for link, name in links.items():
        os.symlink((images / name).resolve(), folder / "links" / link)
    cameras = {}
    for link, name in links.items():
        cameras.setdefault(camera_of(images / name), []).append(link)

    database = folder / "database.db"
    extract_features(database, folder / "links", cameras.values())
    in_order = list(links)
    match_features(database, folder / "pairs.txt", [(in_order[i], in_order[j]) for i, j in pairs_to_match(len(names))])
    (folder / "models").mkdir()
    options = pycolmap.IncrementalPipelineOptions(num_threads=n_cores(), random_seed=0, extract_colors=False)
    with progress(total=len(names), desc="model", unit="photo") as bar:
        models = pycolmap.incremental_mapping(
            database, folder / "links", folder / "models", options,
            initial_image_pair_callback=lambda: bar.update(min(2, bar.total - bar.n)),  # again for another model
            next_image_callback=lambda: bar.update(min(1, bar.total - bar.n)))
    for model in models.values():
        for i in model.images:
            model.image(i).name = links[model.image(i).name]
    return sorted(models.values(), key=lambda model: -model.num_reg_images())


def write_model(photos, out):
    """Write photos, {name: path}, to OUT/images and COLMAP's largest model of them to OUT/sparse, or nothing.

    Raises UserError where there is no model.
    """
    images, part, is_new = out / "images", out / "model.part", not out.exists()
    if images.exists():
        raise UserError(f"{images} exists already, without a model in {out / 'sparse'}; remove it or name another "
                        f"folder than {out}")
    try:
        with writing(out):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_all_upright(photos, part / "images")
            models = compute_models(part / "images", list(photos), part)
            if not models:
                raise UserError(f"{out}: COLMAP finds no model of the {len(photos)} photos; it needs photos that "
                                f"overlap with their neighbours, taken from different places")
            (part / "sparse").mkdir()
            models[0].write(part / "sparse")
            os.rename(part / "images", images)
            os.rename(part / "sparse", out / "sparse")  # last: with it, the folder is complete
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: it is complete
                out.rmdir()
    if len(models) > 1:
        sizes = ", ".join(str(model.num_reg_images()) for model in models[1:])
        print(f"The photos fall into {len(models)} parts that COLMAP cannot join; the largest is taken, and not the "
              f"others, of {sizes} images")


def report_placed(model, names, frames):
    """Print how many of the photos were placed in a model, which were not, and the mean reprojection error."""
    error = pycolmap.Reconstruction(model).compute_mean_reprojection_error()
    placed = {name for name, _ in frames}
    missing = [name for name in names if name not in placed]
    print(f"{model}: {len(placed)} of {len(names)} photos placed, mean reprojection error {error:.2f} pixels")
    if missing:
        rest = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        print(f"{len(missing)} photos not placed, and left out: {', '.join(missing[:5])}{rest}")


def gps_position(path):
    """A photo's GPS position, (latitude, longitude, altitude), degrees and metres, or None. No altitude is 0."""
    with Image.open(path) as image:
        gps = image.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    try:
        latitude, longitude = (
            sum(float(part) / 60 ** i for i, part in enumerate(gps[value])) * (-1 if gps[side] in ("S", "W") else 1)
            for value, side in ((ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef),
                                (ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef)))
        altitude = float(gps.get(ExifTags.GPS.GPSAltitude, 0))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    below = gps.get(ExifTags.GPS.GPSAltitudeRef) in (1, b"\1")
    position = latitude, longitude, -altitude if below else altitude
    return position if np.isfinite(position).all() else None


def scale_of_gps(frames, images):
    """Metres per unit of frames, a list of (image name, pose), from the GPS positions in the images' EXIF data.

    It is the scale of the similarity that takes the cameras to their GPS positions with the least squared distances.
    Raises UserError where fewer than MIN_GPS have one, and where they do not agree with the model.
    """
    found = [(pose[:3], gps) for name, pose in frames if (gps := gps_position(images / name)) is not None]
    if len(found) < MIN_GPS:
        raise UserError(f"--scale_by_gps: {len(found)} of the {len(frames)} placed photos have a GPS position; at "
                        f"least {MIN_GPS} are needed, or take --scale_by")
    positions, gps = (np.array(part, dtype=float) for part in zip(*found, strict=True))
    metres = pycolmap.GPSTransform().ellipsoid_to_ecef(gps)
    metres -= metres.mean(axis=0)
    similarity = pycolmap.estimate_sim3d(positions, metres)
    spread = np.sqrt((metres ** 2).sum(axis=1).mean())
    residual = np.inf
    if similarity is not None:
        moved = similarity.scale * positions @ similarity.rotation.matrix().T + similarity.translation
        residual = np.sqrt(((moved - metres) ** 2).sum(axis=1).mean())
    if not residual < spread / 3:
        raise UserError(f"--scale_by_gps: the GPS positions of {len(found)} photos do not agree with the model: they "
                        f"are {residual:.1f} m off, and spread over {spread:.1f} m (RMS); take --scale_by")
    print(f"Scale from the GPS positions of {len(found)} photos, which are {residual:.1f} m off (RMS)")
    return similarity.scale


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m datasets.prepare_photos",
                                     description="Turn photos of a scene into label files, by COLMAP.")
    parser.add_argument("photos", metavar="PHOTOS", help="a folder with photos, a pattern in quotes, or a video")
    parser.add_argument("out", metavar="OUT", type=Path,
                        help="the folder to write images/, sparse/, <name>_train.csv and <name>_test.csv to")
    parser.add_argument("--name", metavar="NAME", help="the scene's name (default: that of the OUT folder)")
    add_split(parser)
    parser.add_argument("--fps", metavar="F", type=float, help="of a video: the frames per second to take (default: 2)")
    scale = parser.add_mutually_exclusive_group()
    add_scale_by(scale)
    scale.add_argument("--scale_by_gps", action="store_true", help="scale the model by the photos' GPS positions")
    args = parser.parse_args()
    if args.fps is not None and not (is_video(args.photos) and 0 < args.fps < np.inf):
        raise UserError("--fps: is for a video, and a number above 0; leave it out with photos")
    return args


def main():
    """Write the label files that the command line asks for."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, write_photos(args.photos, folder, args.fps or 2) if is_video(args.photos) else args.photos)


def prepare(args, folder):
    """Write the label files of the photos in a folder, or of a pattern. args: of `parse_arguments`."""
    scene = check_scene_name("--name", args.name, args.out)
    photos, left_out = find_photos(folder, args.out)
    if left_out:
        print(f"Left out of {args.photos}: {left_out}")
    if args.scale_by is not None:  # before COLMAP computes for hours
        metres_of(args.scale_by)
        for image in args.scale_by[:2]:
            if image not in photos:
                raise UserError(f"--scale_by {image}: not among the {len(photos)} photos, such as {next(iter(photos))}")
    images, model = args.out / "images", find_model(args.out / "sparse")
    if model.exists():
        with_model = {path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file()}
        if with_model != photos.keys():
            raise UserError(f"{model}: is of other photos than {args.photos}; remove {images} and {model} to compute "
                            f"it anew, or name another folder than {args.out}")
        print(f"{model}: used again; remove it and {images} to compute it anew")
    else:
        write_model(photos, args.out)
    frames = read_model(model)
    report_placed(model, photos, frames)
    if args.scale_by is not None:
        frames = scaled(frames, scale_between(frames, args.scale_by))
    elif args.scale_by_gps:
        frames = scaled(frames, scale_of_gps(frames, images))
    split = split_stretches if args.every is None else lambda sequences: split_every(sequences, args.every)
    has_scale = args.scale_by is not None or args.scale_by_gps
    table = label_table(frames, scene, split)
    write_scene(model, args.out, scene, table, "m" if has_scale else "model units")
    if not has_scale:
        print("Positions are in the model's unit; --scale_by or --scale_by_gps turns them into metres")
    print_next_commands(images, args.out, scene, table)


if __name__ == "__main__":
    cli.run(main)
