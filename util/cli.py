"""What the scripts share: arguments, logging, configuration, seeds and device. Imports nothing heavy before it must."""
import argparse
import logging
import os
import sys
import time
from types import SimpleNamespace

from util.config import load_config
from util.errors import UserError


def parser(description, models):
    """An argument parser with what every script takes, in the published order; a script adds its own behind.

    models: the names that the script's MODEL may have.
    """
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("model_name", metavar="MODEL", type=_model(models), help=f"the APR: {' or '.join(models)}")
    arguments.add_argument("mode", metavar="MODE", choices=("train", "test"), type=lambda mode: {"eval": "test"}.get(mode, mode),
                           help="train or test (eval means test)")
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
    arguments.add_argument("--predictions_path", metavar="FILE.csv",
                           help="in testing: where to write the predicted poses with their errors (default: nowhere)")
    return arguments


def run(script):
    """Call a script's main: a UserError becomes one line on stderr and in the log, and exit status 2."""
    try:
        script()
    except UserError as error:
        logging.getLogger().error(error)
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def start(args, suffix="", section=None):
    """Begin a run: its log, configuration, seeds and device.

    suffix: behind the run's stamp in the names of weights, such as '_pose_encoder'.
    section: the config section of this training, besides the model's.

    Returns a namespace: args, config, device, seed, prefix (of the run's files: DIR/run_<stamp><suffix>), and about(),
    what the JSON beside the weights says.
    """
    prefix = _start_log(args.output_dir)
    logging.info("Start %s with %s", args.model_name, args.mode)
    logging.info("Command: %s", " ".join(sys.argv))
    if args.experiment is not None:
        logging.info("Experiment details: %s", args.experiment)
    logging.info("Using dataset: %s", args.dataset_path)
    logging.info("Using labels file: %s", args.labels_file)
    if args.predictions_path and args.mode != "test":
        raise UserError("--predictions_path is for testing; leave it out in training")
    config = load_config(args.config_file, args.model_name, section, args.preset, args.set)
    logging.info("Running with configuration:\n%s", "\n".join(f"\t{key}: {value}" for key, value in config.items()))

    import numpy as np
    import torch

    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    device = _device(args.device, config.get("device_id", "cuda:0"))
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
            raise argparse.ArgumentTypeError(f"unknown model '{name}': choose {' or '.join(names)}")
        return name
    return model


def _seed(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


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


def _device(asked, preferred):
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        if available == 0:
            logging.info("No CUDA device here: running on the CPU")
            return torch.device("cpu")
        asked = preferred
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{asked}' is unknown: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"device '{asked}' is not here: this machine has {available} CUDA devices; choose auto or cpu")
    return device
