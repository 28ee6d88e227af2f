"""What the scripts share: arguments, logging, configuration, seeds and device. Imports nothing heavy before it must."""
import argparse
import contextlib
import ctypes
import logging
import os
import re
import sys
import time
from types import SimpleNamespace

from models import APR_NAMES
from util.config import load_config
from util.errors import UserError
from util.files import same_file


def parser(description, models, modes=("train", "test")):
    """An argument parser with what every script takes, in the published order; a script adds its own behind.

    models: the names that the script's MODEL may have; modes: what its MODE may be.
    """
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("model_name", metavar="MODEL", type=_model(models), help=f"the APR: {' or '.join(models)}")
    arguments.add_argument("mode", metavar="MODE", choices=modes, type=lambda mode: {"eval": "test"}.get(mode, mode),
                           help=f"{' or '.join(modes)} (eval means test)")
    arguments.add_argument("backbone_path", metavar="BACKBONE",
                           help="the backbone's weights: a .pth file, 'imagenet' (downloaded) or 'none' (random); with an "
                                "APR checkpoint, the checkpoint brings them")
    arguments.add_argument("dataset_path", metavar="DATASET", help="the folder that image paths are relative to")
    arguments.add_argument("labels_file", metavar="LABELS", help="the label file (CSV) to train or test on")
    arguments.add_argument("config_file", metavar="CONFIG", help="the hyper-parameters, such as config.json")
    arguments.add_argument("--experiment", metavar="TEXT", help="a note for the log (default: none)")
    arguments.add_argument("--output_dir", metavar="DIR", default="out", help="where logs and weights go (default: out)")
    arguments.add_argument("--preset", metavar="NAME",
                           help="a preset of the config file: 7Scenes, CambridgeLandmarks or CambridgeLandmarks-finetune "
                                "in config.json (default: none)")
    arguments.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
                           help="change keys of the config, values as in JSON, such as n_epochs=20 (default: none)")
    arguments.add_argument("--device", metavar="DEVICE", default="auto",
                           help="auto, cpu, cuda or cuda:N; auto takes the config's device_id where there is CUDA, else "
                                "the CPU (default: auto)")
    arguments.add_argument("--seed", metavar="N", type=_seed, default=0, help="makes runs repeatable (default: 0)")
    arguments.add_argument("--cache_dir", metavar="DIR",
                           help="keep decoded frames in a file of this folder, for this run and later ones (default: in "
                                "memory while training)")
    arguments.add_argument("--predictions_path", metavar="FILE.csv",
                           help="in testing: where to write the predicted poses with their errors (default: nowhere)")
    return arguments


def run(script):
    """Call a script's main: a UserError becomes one line on stderr and in the log, and exit status 2."""
    try:
        script()
    except UserError as error:
        if logging.getLogger().handlers:
            logging.error(error)
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def start(args, suffix="", sections=()):
    """Begin a run: its log, configuration, seeds and device.

    suffix: behind the run's stamp in the names of weights, such as '_pose_encoder'.
    sections: the config sections that this script reads besides the model's.

    Returns a namespace: args, config, device, seed, and prefix (of the run's files: DIR/run_<stamp><suffix>).
    """
    prefix = _start_log(args.output_dir)
    logging.info("Start %s with %s", args.model_name, args.mode)
    logging.info("Command: %s", " ".join(sys.argv))
    if args.experiment is not None:
        logging.info("Experiment details: %s", args.experiment)
    logging.info("Using dataset: %s", args.dataset_path)
    logging.info("Using labels file: %s", args.labels_file)
    if args.predictions_path:
        _check_predictions_path(args)
    config = load_config(args.config_file, args.model_name, sections, args.preset, args.set)
    logging.info("Running with configuration:\n%s", "\n".join(f"\t{key}: {value}" for key, value in config.items()))

    import torch

    torch.manual_seed(args.seed)
    device = device_of(args.device, config.get("device_id", "cuda:0"))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
    return SimpleNamespace(args=args, config=config, device=device, seed=args.seed, prefix=prefix + suffix)


def about(run, model, scene_names):
    """What the JSON beside a run's weights says. scene_names: in the order of the model's scene indices, or None."""
    return {"model": model, "config": run.config, "scene_names": scene_names, "labels_file": run.args.labels_file,
            "seed": run.seed}


def _model(names):
    def model(name):
        if name == "ms-transposenet" and name not in names:
            raise argparse.ArgumentTypeError("ms-transposenet returns no latents, so it can have no PAE and no refiner; "
                                             f"choose {' or '.join(names)}")
        if name not in names:
            problem = f"{name} is not for this script" if name in APR_NAMES else f"unknown model '{name}'"
            raise argparse.ArgumentTypeError(f"{problem}: choose {' or '.join(names)}")
        return name
    return model


def _seed(text):
    if not text.isdecimal() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to below 2**63")
    return int(text)


def _check_predictions_path(args):
    if args.mode == "train":
        raise UserError("--predictions_path is for testing; leave it out in training")
    path = args.predictions_path
    if os.path.isdir(path):
        raise UserError(f"--predictions_path {path}: is a folder; name a file")
    for labels_file in (args.labels_file, getattr(args, "ref_poses_file", None)):
        if labels_file and same_file(path, labels_file):
            raise UserError(f"--predictions_path {path}: is the label file {labels_file}, which must stay; name another")


def _start_log(output_dir):
    """Log to the screen and to DIR/run_<stamp>.log, a new file for every run; returns its path without '.log'."""
    stamp = time.strftime("%d_%m_%y_%H_%M")
    try:
        os.makedirs(output_dir, exist_ok=True)
        n = 1
        while True:
            prefix = os.path.join(output_dir, f"run_{stamp}" + (f"_{n}" if n > 1 else ""))
            try:
                log = open(f"{prefix}.log", "x")
                break
            except FileExistsError:
                n += 1
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be written: {error.strerror}") from error
    to_file, to_screen = logging.StreamHandler(log), logging.StreamHandler(sys.stdout)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen.addFilter(lambda record: record.levelno < logging.ERROR)  # errors go to stderr, see run()
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_screen], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    return prefix


def keep_freed_memory():
    """Tell glibc to keep freed memory. By default it gives large blocks back at once, and on a CPU every step of a training
    pays again for the pages of all its activations, which takes as long as computing them."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library has no mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD
            mallopt(parameter, value)


def device_of(asked, preferred="cuda:0"):
    """The device that --device asks for; 'auto' takes the preferred one where it is. Raises UserError for one that is not."""
    import torch

    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *["cuda"] * (n_cuda > 0), *(f"cuda:{i}" for i in range(n_cuda))]
    if asked == "auto":
        asked = preferred if preferred in here else "cuda" if n_cuda else "cpu"
        if asked != preferred:
            logging.info("No %s here: running on %s", preferred, asked)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UserError(f"device '{asked}' is unknown: choose auto, cpu, cuda or cuda:N")
    if asked not in here:
        raise UserError(f"device '{asked}' is not here: this machine has {n_cuda} CUDA devices; choose auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if asked == "cuda" else torch.device(asked)
