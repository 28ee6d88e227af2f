"""The short forms of predict and export, which ask for nothing that the weights know.

    python main.py predict PHOTOS --checkpoint_path W.pth [--predictions_path P.csv]
    python main.py export [DATASET LABELS] --checkpoint_path W.pth --export_path W.onnx
"""
import argparse
import json
import os

from util.config import load_config
from util.errors import UserError

_CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "config.json")
_NOT_IN_TENSORS = ("nhead", "reduction")  # what only the JSON beside MS-Transformer's weights tells


def names_onnx_file(arguments):
    """Whether the --checkpoint_path among arguments is an ONNX file's, by its name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint_path", default="")
    return parser.parse_known_args(arguments)[0].checkpoint_path.endswith(".onnx")


def in_full(arguments):
    """The published form of the arguments of a short predict or export, which begin with that word."""
    mode, *arguments = arguments
    usage = None if mode == "predict" else (
        "main.py export [DATASET LABELS] --checkpoint_path W.pth --export_path W.onnx [options]")
    parser = argparse.ArgumentParser(prog=f"main.py {mode}", usage=usage, description=__doc__.splitlines()[0], epilog=(
        "All options of main.py can follow; python main.py -h lists them."))
    if mode == "predict":
        parser.add_argument("photos", metavar="PHOTOS", help="a folder of images, an image, a pattern in quotes, - "
                                                             "for a list on standard input, or a video")
    parser.add_argument("--checkpoint_path", metavar="W.pth", required=True, help="the APR's weights")
    parser.add_argument("--encoder_checkpoint_path", metavar="PAE.pth",
                        help="the APR's PAE, which tells the poses' novelty and, in predict, corrects them "
                             "(default: none)")
    if mode == "predict":
        parser.add_argument("--predictions_path", metavar="P.csv", default="poses.csv",
                            help="where the poses go (default: poses.csv)")
    first = 0  # option; export's DATASET and LABELS must come before it, or values of options would be taken for them
    while mode == "export" and first < len(arguments) and not arguments[first].startswith("-"):
        first += 1
    args, others = parser.parse_known_args(arguments[first:])
    given = [args.photos, "-"] if mode == "predict" else arguments[:first] or ["-", "-"]
    if len(given) != 2:
        raise UserError(f"export takes a dataset's folder and a label file, or neither, not {' '.join(given)}")
    model, settings = known_settings(args.checkpoint_path, args.encoder_checkpoint_path)
    in_full = [model, mode, "none", *given, _CONFIG, "--checkpoint_path", args.checkpoint_path]
    if mode == "predict":
        in_full += ["--predictions_path", args.predictions_path]
    if args.encoder_checkpoint_path:
        in_full += ["--encoder_checkpoint_path", args.encoder_checkpoint_path]
    return [*in_full, *others, "--set", *_overrides(settings)]


def known_settings(path, encoder_path=None):
    """What an APR's weights, and those of its PAE, determine: (the model's name, {config key: value}).

    Tensors tell all but _NOT_IN_TENSORS. Raises UserError for weights of another kind, and where the backbone is
    unknown.
    """
    from models import APR_NAMES
    from models.checkpoints import describe, read_about, read_weights

    if str(path).endswith(".onnx"):
        raise UserError(f"{path}: an ONNX file; the weights that it was exported from are needed")
    settings = describe(read_weights(path))
    model = settings.pop("kind", None)
    if model not in APR_NAMES:
        held = f"a checkpoint of {model}" if model else "weights of no model known here"
        swapped = encoder_path and describe(read_weights(encoder_path)).get("kind") in APR_NAMES
        raise UserError(f"{path}: {held}, but an APR's is needed{'; are the two files swapped?' if swapped else ''}")
    if model == "posenet" and "backbone_type" not in settings:
        raise UserError(f"{path}: its tensors are of no backbone known here")
    config = read_about(path).get("config")
    for key in _NOT_IN_TENSORS:
        if model != "posenet" and isinstance(config, dict) and key in config:
            settings[key] = config[key]
    if encoder_path:
        settings = {**{key: value for key, value in describe(read_weights(encoder_path)).items() if key != "kind"},
                    **settings}
    return model, settings


def config_of(model, settings):
    """The configuration of a model: config.json's, with these settings."""
    return load_config(_CONFIG, model, ("pose_encoder",), None, _overrides(settings))


def _overrides(settings):
    """Settings as --set takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
