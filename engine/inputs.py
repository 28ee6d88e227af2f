"""What predict takes: images, a video, a list of images, or a folder to watch."""
import argparse
import os

from util.errors import UserError


def add_input_options(parser):
    """Add the options that say how predict takes images or a video."""
    parser.add_argument("--as_stored", action="store_true",
                        help="in predict: leave images as stored that have an EXIF orientation, and videos that have a "
                             "rotation (default: turn them upright)")
    parser.add_argument("--every", metavar="N", type=_every,
                        help="in predict, with a video: take every N-th frame (default: 1)")
    parser.add_argument("--watch", action="store_true",
                        help="in predict, with a folder: predict the images that it has and those that arrive, until "
                             "Ctrl-C; rows are appended to --predictions_path, or printed where that is - (default: "
                             "off)")


def check_input_options(args):
    """Raise UserError for options that do not fit what is to be predicted."""
    if args.as_stored and args.mode != "predict":
        raise UserError(f"--as_stored is for predict: {args.mode} takes frames as stored, as their labels are; leave "
                        "it out")
    if args.every:
        from datasets.images import VIDEO_EXTENSIONS, is_video

        if args.mode != "predict" or not is_video(args.dataset_path):
            raise UserError(f"--every is for predict with a video ({', '.join(VIDEO_EXTENSIONS)}), of which it takes "
                            "every N-th frame; leave it out")
    if args.watch and not (args.mode == "predict" and os.path.isdir(args.dataset_path)):
        raise UserError("--watch is for predict with a folder, which must exist; leave it out otherwise")
    if args.watch and args.cache_dir:
        raise UserError("--cache_dir is for images that are read again; leave it out with --watch")


def open_input(images, as_stored, every):
    """The frames to predict: datasets.unlabelled.Images, or datasets.video.VideoFrames. Raises UserError for none."""
    from datasets.images import is_video
    from datasets.unlabelled import Images
    from datasets.video import VideoFrames

    return VideoFrames(images, every or 1, as_stored) if is_video(images) else Images(images, as_stored)


def _every(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)
