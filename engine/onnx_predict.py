"""Predict the poses of images by an ONNX file, in short, without PyTorch.

    python main.py predict PHOTOS --checkpoint_path W.onnx [--predictions_path P.csv] [--as_stored] [--max_novelty X]
"""
import argparse
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd

from datasets.images import is_video
from datasets.resources import n_cores
from datasets.unlabelled import Images
from engine.onnx_file import estimate, open_model, poses_of
from engine.predictions import with_predictions, write_predictions
from engine.run import check_predictions_path, start_log
from util.errors import UserError, first_five
from util.progress import progress
from util.units import set_unit

_CHUNK = 64  # images decoded at a time, so that memory stays small


def predict(arguments):
    """Predict as the arguments behind 'predict' say."""
    args = _parse(arguments)
    check_predictions_path(args)
    if is_video(args.dataset_path):
        raise UserError(f"{args.dataset_path}: an ONNX file predicts images, not videos; predict videos by the weights")
    session, about = open_model(args.checkpoint_path)
    if about["input"] != "frames":
        raise UserError(f"{args.checkpoint_path}: takes normalised tensors, not frames; export it without --input")
    if args.max_novelty is not None and "novelty" not in [output.name for output in session.get_outputs()]:
        raise UserError(f"--max_novelty: {args.checkpoint_path} does not tell novelty; export it with "
                        "--encoder_checkpoint_path, a PAE that remembers training frames")
    set_unit(about["unit"])
    start_log(args)
    logging.info("Command: %s", " ".join(sys.argv))
    logging.info("Model: %s of version %s, %s, from weights of SHA-256 %s", about["model"], about["version"],
                 about["precision"], about["weights_sha256"])
    images = Images(args.dataset_path, args.as_stored)
    results, readable = _estimates(session, images)
    unreadable = images.problems(readable)
    if not readable.any():
        raise UserError(first_five(unreadable))
    names = [name for name, is_readable in zip(images.names, readable) if is_readable]
    predictions = with_predictions(pd.DataFrame({"img_path": names}), {**results, "pose": poses_of(results)},
                              about["scene_names"], args.max_novelty)
    write_predictions(args.predictions_path, predictions, results["milliseconds_alone"])
    if unreadable:
        raise UserError(f"{first_five(unreadable)}; {args.predictions_path} has the poses of {images.others}")


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="main.py predict", description=__doc__.splitlines()[0])
    parser.add_argument("dataset_path", metavar="PHOTOS", help="a folder of images, an image, or a pattern in quotes")
    parser.add_argument("--checkpoint_path", metavar="W.onnx", required=True, help="the file of main.py export")
    parser.add_argument("--predictions_path", metavar="P.csv", default="poses.csv",
                        help="where the poses go (default: poses.csv)")
    parser.add_argument("--as_stored", action="store_true",
                        help="leave images as stored that have an EXIF orientation (default: turn them upright)")
    parser.add_argument("--max_novelty", metavar="X", type=float,
                        help="reject images of a larger novelty, where the file tells it (default: none)")
    parser.add_argument("--output_dir", metavar="DIR", default="out", help="where the log goes (default: out)")
    known = argparse.Namespace(name=None, resume=None, verbose=False, mode="predict", labels_file="-")
    args, others = parser.parse_known_args(arguments, known)
    if others:
        raise UserError(f"{others[0]} is not for an ONNX file: predict takes PHOTOS, --checkpoint_path, "
                        "--predictions_path, --as_stored, --max_novelty and --output_dir with it")
    return args


def _estimates(session, images):
    """A model's outputs for those images that can be read, with 'milliseconds_alone'; and which can: N."""
    outputs, elapsed_ms, readable = [], [], []
    with ThreadPoolExecutor(n_cores()) as pool, progress(total=len(images), unit="frame") as bar:
        for begin in range(0, len(images), _CHUNK):
            for image in pool.map(images.read, range(begin, min(begin + _CHUNK, len(images)))):
                pixels = np.asarray(image)
                readable.append(pixels.size > 0)
                if pixels.size:
                    start = time.perf_counter()
                    outputs.append(estimate(session, pixels[None]))
                    elapsed_ms.append(1000 * (time.perf_counter() - start))
                bar.update()
    results = {key: np.concatenate([output[key] for output in outputs]) for key in (outputs[0] if outputs else ())}
    return {**results, "milliseconds_alone": elapsed_ms}, np.array(readable)
