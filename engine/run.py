"""A run of a script: its arguments, configuration, seed, device and log. Imports nothing heavy before it must."""
import argparse
import contextlib
import glob
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine import resume
from models import APR_NAMES
from util import cli, processes
from util.config import Config, load_config
from util.errors import UserError
from util.files import lock, remove_parts, same_file, writing
from util.log import log_nowhere, log_to
from util.units import set_unit

_training = None  # the training of this process, to say how to resume it


@dataclass
class Run:
    """The values that a run is made of, for everything below the scripts.

    device: a torch.device. seed: of everything random.
    prefix: of the run's files, DIR/run_<stamp><suffix>.
    labels_file: its path, for messages and for the JSON beside weights.
    cache_dir, predictions_path, max_novelty: of the options of these names, or None.
    settings: of a training, what a resumed one must repeat (resume.settings_of).
    resumed: the state to resume a training from, or None.
    decoded_ahead: paths of images -> an ImageCache of those that are decoded already, or None where none is; itself
        None where nothing is decoded ahead.
    """
    config: Config
    device: object
    seed: int = 0
    prefix: str = ""
    labels_file: str | None = None
    cache_dir: str | None = None
    predictions_path: str | None = None
    max_novelty: float | None = None
    tensorboard: bool = False
    settings: str | None = None
    resumed: dict | None = None
    decoded_ahead: Callable | None = None


def run_main(script):
    """Call a script's main. It ends as `cli.run` says; a training that a signal ends says how to resume it."""
    global _training
    _training = None
    cli.run(script, lambda: resume.advice(_training) if _training else "")


def start(args, suffix="", sections=(), ahead=False):
    """Begin a run, or resume one: its log, configuration, seed, device and processes. Returns a `Run`.

    args: of `parser`. suffix: behind the run's stamp in the names of weights, such as '_pose_encoder'.
    sections: the config sections that this script reads besides the model's.
    ahead: whether to decode the first frames of the label file while PyTorch is loaded.
    """
    global _training
    for option in ("resume", "val_labels_file", "tensorboard"):
        if getattr(args, option) and args.mode != "train":
            raise UserError(f"--{option} is for training; leave it out otherwise")
    if args.predictions_path:
        check_predictions_path(args)
    if args.max_novelty is not None and not args.predictions_path:
        raise UserError("--max_novelty rejects poses in the file of --predictions_path; give that too")
    _check_files(args)
    unit = unit_of(args)
    set_unit(unit)
    prefix = start_log(args, suffix) if processes.rank() == 0 else log_nowhere()
    logging.info("Start %s with %s", args.model_name, args.mode)
    logging.info("Command: %s", " ".join(sys.argv))
    if args.experiment is not None:
        logging.info("Experiment details: %s", args.experiment)
    logging.info("Using dataset: %s", args.dataset_path)
    logging.info("Using labels file: %s", args.labels_file)
    config = load_config(args.config_file, args.model_name, sections, args.preset, args.set)
    logging.info("Running with configuration:\n%s", "\n".join(f"\t{key}: {value}" for key, value in config.items()))

    decoded_ahead = None
    if ahead and not args.cache_dir:
        from datasets.ahead import decode_ahead

        decoded_ahead = decode_ahead(args.dataset_path, args.labels_file)
    device = device_of(args.device, config["device_id"])
    _start_torch(args.seed, device)
    _warn_of_another_unit(args, unit)
    run = Run(config, device, seed=args.seed, prefix=processes.broadcast(prefix) + suffix, labels_file=args.labels_file,
              cache_dir=args.cache_dir, predictions_path=args.predictions_path, max_novelty=args.max_novelty,
              tensorboard=args.tensorboard, decoded_ahead=decoded_ahead)
    if args.mode == "train":
        files = {name: path for name in ("labels_file", "val_labels_file", "checkpoint_path", "apr_checkpoint_path")
                 if (path := getattr(args, name, None)) is not None}
        run.settings = resume.settings_of(args.model_name, args.seed, config, files)
        _training = run
    if args.resume:
        if processes.rank() == 0:
            run.resumed = resume.read(run.prefix)
            resume.check_settings(run.resumed, run.settings, {override.partition("=")[0] for override in args.set})
            logging.info("Resuming after epoch %d", run.resumed["epoch"])
        run.resumed = processes.broadcast(run.resumed)
    return run


def about(run, model, scene_names):
    """The content of the JSON beside a run's weights. scene_names: in the order of the scene indices, or None."""
    from datasets.descriptions import read_convention, read_unit

    convention = read_convention(run.labels_file, scene_names or ())
    return {"model": model, "config": run.config, "scene_names": scene_names, "labels_file": run.labels_file,
            "seed": run.seed, "unit": read_unit(run.labels_file),
            **({} if convention is None else {"convention": convention})}


def parser(description, models, modes=("train", "test")):
    """An argument parser with what every script takes, in the published order; a script appends its own.

    models: the names that the script's MODEL may have. modes: what its MODE may be.
    """
    arguments = _Parser(description=description)
    arguments.add_argument("model_name", metavar="MODEL", type=_model(models), help=f"the APR: {' or '.join(models)}")
    arguments.add_argument("mode", metavar="MODE", choices=modes, type=lambda mode: {"eval": "test"}.get(mode, mode),
                           help=f"{' or '.join(modes)} (eval means test)")
    arguments.add_argument("backbone_path", metavar="BACKBONE",
                           help="the backbone's weights: a .pth file, 'imagenet' (downloaded) or 'none' (random); "
                                "with an APR checkpoint, the checkpoint brings them")
    arguments.add_argument("dataset_path", metavar="DATASET", help="the folder that image paths are relative to" + (
                               "; to predict, images: a folder, a pattern in quotes, - for a list on standard input, "
                               "or a video; to export, -, but with --quantize the folder" if "predict" in modes
                               else ""))
    arguments.add_argument("labels_file", metavar="LABELS", help="the label file (CSV) to train or test on"
                           + ("; to predict, and to export without --quantize, -" if "predict" in modes else ""))
    arguments.add_argument("config_file", metavar="CONFIG", help="the hyper-parameters, such as config.json")
    arguments.add_argument("--experiment", metavar="TEXT", help="a note for the log (default: none)")
    arguments.add_argument("--output_dir", metavar="DIR", default="out",
                           help="where logs and weights go (default: out)")
    arguments.add_argument("--name", metavar="NAME", type=_name,
                           help="a folder of --output_dir for this run's files (default: none)")
    arguments.add_argument("--verbose", action="store_true",
                           help="show what else goes to the log alone: a test's line for every frame")
    arguments.add_argument("--preset", metavar="NAME",
                           help="a preset of the config file: 7Scenes, CambridgeLandmarks or "
                                "CambridgeLandmarks-finetune in config.json (default: none)")
    arguments.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
                           help="change keys of the config, values as in JSON, such as n_epochs=20 (default: none)")
    arguments.add_argument("--device", metavar="DEVICE", default="auto",
                           help="auto, cpu, cuda or cuda:N; auto takes the config's device_id where there is CUDA, "
                                "else the CPU (default: auto)")
    arguments.add_argument("--seed", metavar="N", type=_seed, default=0, help="makes runs repeatable (default: 0)")
    arguments.add_argument("--cache_dir", metavar="DIR",
                           help="keep decoded frames in a file of this folder, for this run and later ones (default: "
                                "in memory while training)")
    arguments.add_argument("--val_labels_file", metavar="VAL.csv",
                           help="in training: test on these labels every n_freq_validate epochs, and keep the best "
                                "weights in run_<stamp>_best.pth (default: none)")
    arguments.add_argument("--tensorboard", action="store_true",
                           help="in training: also write the curves of loss, errors and learning rate for "
                                "TensorBoard, after every epoch, in run_<stamp>_tensorboard (default: off)")
    arguments.add_argument("--resume", metavar="RUN",
                           help="resume a training from its last whole epoch: the stamp in its files' names, or "
                                "'latest' of --output_dir; all other arguments as they were (default: a new training)")
    arguments.add_argument("--predictions_path", metavar="FILE.csv",
                           help="except in training: where to write the predicted poses, in tests with their errors "
                                "(default: nowhere)")
    arguments.add_argument("--max_novelty", metavar="X", type=float,
                           help="with --predictions_path and a PAE: reject frames of a larger novelty, in units of a "
                                "median training frame's; they keep their row, with an empty pose (default: none)")
    return arguments


class _Parser(argparse.ArgumentParser):
    """A parser whose message explains weights too many."""

    def error(self, message):
        if message.startswith("unrecognized arguments") and ".pth" in message:
            message += " (a pattern such as run_*_final.pth stands for several files: name one)"
        super().error(message)


def _model(names):
    def model(name):
        if name == "ms-transposenet" and name not in names:
            raise argparse.ArgumentTypeError("ms-transposenet returns no latents, so it can have no PAE and no "
                                             f"refiner; choose {' or '.join(names)}")
        if name not in names:
            problem = f"{name} is not for this script" if name in APR_NAMES else f"unknown model '{name}'"
            raise argparse.ArgumentTypeError(f"{problem}: choose {' or '.join(names)}")
        return name
    return model


def _name(text):
    if not re.fullmatch(r"[\w.-]+", text) or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder's name of letters, digits, dots, - and _")
    return text


def _seed(text):
    if not text.isdecimal() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to below 2**63")
    return int(text)


def _check_files(args):
    """Raise UserError for weights and label files that do not exist, before anything slow is loaded."""
    for path in (args.labels_file, args.val_labels_file, getattr(args, "ref_poses_file", None)):
        if path not in (None, "-") and not os.path.exists(path):
            raise UserError(f"{path}: not a readable label file: No such file or directory")
    for option in ("checkpoint_path", "apr_checkpoint_path", "rpr_checkpoint_path"):
        path = getattr(args, option, None)
        if path is not None and not os.path.exists(path):
            raise UserError(f"{path}: no such file")


def unit_of(args):
    """The unit of positions: of the label file or, without one, of the APR's training, as the JSON beside it says."""
    if args.labels_file != "-":
        from datasets.descriptions import read_unit

        return read_unit(args.labels_file)
    from models.checkpoints import read_about

    return read_about(args.checkpoint_path).get("unit", "m") if args.checkpoint_path else "m"


def _warn_of_another_unit(args, unit):
    """Warn where the APR was trained on labels of another unit than that of those that are given."""
    from models.checkpoints import read_about

    path = getattr(args, "apr_checkpoint_path", None) or getattr(args, "checkpoint_path", None)
    trained_in = read_about(path).get("unit") if path else None
    if trained_in is not None and trained_in != unit:
        logging.warning("%s was trained on positions in %s, but those of %s are in %s: position errors mean nothing, "
                        "unless it is trained anew", path, trained_in, args.labels_file, unit)


def check_predictions_path(args):
    """Raise UserError for a --predictions_path that cannot be, or must not be, written."""
    if args.mode == "train":
        raise UserError("--predictions_path is for testing; leave it out in training")
    path = args.predictions_path
    if path == "-" and not getattr(args, "watch", False):
        raise UserError("--predictions_path -: only --watch prints its rows; name a file")
    if os.path.isdir(path):
        raise UserError(f"--predictions_path {path}: is a folder; name a file")
    for labels_file in (args.labels_file, getattr(args, "ref_poses_file", None)):
        if labels_file and same_file(path, labels_file):
            raise UserError(f"--predictions_path {path}: is the label file {labels_file}, which must stay; name "
                            "another")


def start_log(args, suffix=""):
    """Log to the screen and to DIR/run_<stamp>.log, a new file or the resumed run's; returns its path without .log."""
    if args.name is not None:
        args.output_dir = os.path.join(args.output_dir, args.name)
    with writing(f"--output_dir {args.output_dir}"):
        os.makedirs(args.output_dir, exist_ok=True)
        if args.resume:
            prefix = resume.find(args.output_dir, args.resume, suffix)
            log = os.open(f"{prefix}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if not lock(log):
                raise UserError(f"--resume {args.resume}: {prefix}.log is being written: this training is running")
            remove_parts(f"{glob.escape(prefix)}_[a-z]*.part")
        else:
            remove_parts(f"{glob.escape(args.output_dir)}/run_*.part", older_than=60)
            prefix, log = _new_log(os.path.join(args.output_dir, time.strftime("run_%d_%m_%y_%H_%M")))
            lock(log)
    rows_on_stdout = args.predictions_path == "-" and getattr(args, "watch", False)
    log_to(f"{prefix}.log", log, args.verbose, sys.stderr if rows_on_stdout else None)
    return prefix


def _new_log(path):
    for n in itertools.count(1):
        prefix = path + (f"_{n}" if n > 1 else "")
        with contextlib.suppress(FileExistsError):
            return prefix, os.open(f"{prefix}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)


def _start_torch(seed, device):
    import torch

    from models.cpu import keep_freed_memory

    torch.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
    processes.join(device)


def device_of(asked, preferred="cuda:0"):
    """The device that --device asks for. 'auto' takes the preferred one where it exists.

    With several processes each takes a GPU of its own. Raises UserError for a device that does not exist.
    """
    import torch

    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu", *["cuda"] * (n_cuda > 0), *(f"cuda:{i}" for i in range(n_cuda))]
    if processes.under_torchrun() and asked != "cpu" and n_cuda:
        if asked not in ("auto", "cuda") or processes.local_world_size() > n_cuda:
            raise UserError(f"--device {asked} with {processes.local_world_size()} processes on this machine: each "
                            f"takes a GPU of its own, and there are {n_cuda}; start at most {n_cuda} and leave "
                            "--device out")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if asked == "auto":
        asked = preferred if preferred in available else "cuda" if n_cuda else "cpu"
        if asked != preferred:
            logging.info("No %s here: running on %s", preferred, asked)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UserError(f"device '{asked}' is unknown: choose auto, cpu, cuda or cuda:N")
    if asked not in available:
        raise UserError(f"device '{asked}' is not here: this machine has {n_cuda} CUDA devices; choose auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if asked == "cuda" else torch.device(asked)
