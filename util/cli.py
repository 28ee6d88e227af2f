"""What the scripts share: arguments, logging, configuration, seeds and device. Imports nothing heavy before it must."""
import argparse
import contextlib
import ctypes
import glob
import itertools
import logging
import os
import re
import sys
import time
from types import SimpleNamespace

from models import APR_NAMES
from util import processes, resume, signals
from util.config import load_config
from util.errors import UserError
from util.files import lock, remove_parts, same_file

_training = None  # the run that this process trains in, to say how to go on with it


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
    arguments.add_argument("dataset_path", metavar="DATASET", help="the folder that image paths are relative to" + ("; to predict, images: a folder, or a "
                           "pattern in quotes" if "predict" in modes else ""))
    arguments.add_argument("labels_file", metavar="LABELS", help="the label file (CSV) to train or test on"
                           + ("; to predict, -" if "predict" in modes else ""))
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
    arguments.add_argument("--val_labels_file", metavar="VAL.csv",
                           help="in training: test on these labels every n_freq_validate epochs, and keep the best weights apart, in "
                                "run_<stamp>_best.pth (default: none)")
    arguments.add_argument("--tensorboard", action="store_true",
                           help="in training: write the curves of loss, errors and learning rate after every epoch, for TensorBoard too, in "
                                "run_<stamp>_tensorboard (default: not)")
    arguments.add_argument("--resume", metavar="RUN",
                           help="go on with a training from its last whole epoch: the stamp in its files' names, or 'latest' of "
                                "--output_dir; all else as it was given (default: a new training)")
    arguments.add_argument("--predictions_path", metavar="FILE.csv",
                           help="but in training: where to write the predicted poses, in testing with their errors (default: nowhere)")
    return arguments


def run(script):
    """Call a script's main. A UserError becomes one line on stderr and in the log, and exit status 2; SIGINT and SIGTERM one
    line that says how to go on, and 130 or 143."""
    global _training
    _training = None
    try:
        # Processes but the first have nothing to tidy up or say.
        with signals.raised() if processes.rank() == 0 else contextlib.nullcontext():
            try:
                script()
            except (OSError, RuntimeError) as error:
                if "Too many open files" in str(error):  # PyTorch's loader says it in words alone
                    raise UserError("too many open files for a process here: allow more (ulimit -n 1024), or take fewer workers "
                                    "(--set n_workers=0)") from error
                if not (processes.under_torchrun() and re.search("Connection (closed|reset) by peer", str(error))):
                    raise
                time.sleep(2)  # torchrun ends the others by a signal, which says more
                raise UserError(f"process {processes.rank()} of this run: another one has ended; see what it said") from error
    except UserError as error:
        if processes.rank() > 0:
            time.sleep(5)  # if the first process has the same to say, torchrun ends this one meanwhile
        _say(f"error: {error}")
        sys.exit(2)
    except signals.Stopped as stopped:
        if processes.rank() == 0:
            _say(f"{stopped}" + (f"; {resume.advice(_training)}" if _training else ""))
        sys.exit(stopped.status)


def _say(text):
    if logging.getLogger().handlers:
        with contextlib.suppress(UserError):  # the log cannot be written
            logging.error(text.removeprefix("error: "))
    print(f"{os.path.basename(sys.argv[0])}: {text}", file=sys.stderr)


def start(args, suffix="", sections=()):
    """Begin a run, or with --resume go on with one: its log, configuration, seeds, device and processes.

    suffix: behind the run's stamp in the names of weights, such as '_pose_encoder'.
    sections: the config sections that this script reads besides the model's.

    Returns a namespace: args, config, settings (of resume.settings_of, in training), resumed (the state to go on from, or
    None), device, seed, and prefix (of the run's files: DIR/run_<stamp><suffix>).
    """
    global _training
    for option in ("resume", "val_labels_file", "tensorboard"):
        if getattr(args, option) and args.mode != "train":
            raise UserError(f"--{option} is for training; leave it out otherwise")
    if args.predictions_path:
        _check_predictions_path(args)
    prefix = _start_log(args, suffix) if processes.rank() == 0 else None
    if processes.rank() > 0:
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
    logging.info("Start %s with %s", args.model_name, args.mode)
    logging.info("Command: %s", " ".join(sys.argv))
    if args.experiment is not None:
        logging.info("Experiment details: %s", args.experiment)
    logging.info("Using dataset: %s", args.dataset_path)
    logging.info("Using labels file: %s", args.labels_file)
    config = load_config(args.config_file, args.model_name, sections, args.preset, args.set)
    logging.info("Running with configuration:\n%s", "\n".join(f"\t{key}: {value}" for key, value in config.items()))

    import torch

    torch.manual_seed(args.seed)
    device = device_of(args.device, config.get("device_id", "cuda:0"))
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
    processes.join(device)
    prefix = processes.of_first(prefix)
    started = SimpleNamespace(args=args, config=config, settings=None, resumed=None, device=device, seed=args.seed,
                              prefix=prefix + suffix)
    if args.mode == "train":
        started.settings = resume.settings_of(args, config)
        _training = started
    if args.resume:
        if processes.rank() == 0:
            started.resumed = resume.read(started.prefix)
            resume.check_settings(started.resumed, started.settings, {override.partition("=")[0] for override in args.set})
            logging.info("Going on after epoch %d", started.resumed["epoch"])
        started.resumed = processes.of_first(started.resumed)
    return started


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


def _start_log(args, suffix):
    """Log to the screen and to DIR/run_<stamp>.log, a new file for every run but one that goes on; returns its path without
    '.log'."""
    try:
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
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written: {error.strerror}") from error
    to_file, to_screen = _LogFile(f"{prefix}.log", log), _Screen(sys.stdout)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen.addFilter(lambda record: record.levelno < logging.ERROR)  # errors go to stderr, see run()
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_screen], format="%(message)s", force=True)
    logging.captureWarnings(True)
    for library in ("matplotlib", "numexpr"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return prefix


def _new_log(path):
    for n in itertools.count(1):
        prefix = path + (f"_{n}" if n > 1 else "")
        with contextlib.suppress(FileExistsError):
            return prefix, os.open(f"{prefix}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)


class _LogFile(logging.Handler):
    """Writes records to an open file's descriptor, at once. A disk that is full ends the run."""

    def __init__(self, path, descriptor):
        super().__init__()
        self.path, self.descriptor = path, descriptor

    def emit(self, record):
        try:
            os.write(self.descriptor, (self.format(record) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
        super().close()


class _Screen(logging.StreamHandler):
    """Writes records to the screen, above progress bars, as long as there is one: a run outlives its terminal, or the
    `| head` behind it."""

    def emit(self, record):
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)

    def handleError(self, record):
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(OSError, ValueError):  # what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def keep_freed_memory():
    """Tell glibc to keep freed memory. By default it gives large blocks back at once, and on a CPU every step of a training
    pays again for the pages of all its activations, which takes as long as computing them."""
    with contextlib.suppress(OSError, AttributeError):  # another system's library has no mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-4, 0), (-1, -1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never), M_TOP_PAD
            mallopt(parameter, value)


def device_of(asked, preferred="cuda:0"):
    """The device that --device asks for; 'auto' takes the preferred one where it is, and of several processes each a GPU of
    its own. Raises UserError for one that is not there."""
    import torch

    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *["cuda"] * (n_cuda > 0), *(f"cuda:{i}" for i in range(n_cuda))]
    if processes.under_torchrun() and asked != "cpu" and n_cuda:
        if asked not in ("auto", "cuda") or processes.n_here() > n_cuda:
            raise UserError(f"--device {asked} with {processes.n_here()} processes on this machine: each takes a GPU of its own, "
                            f"and there are {n_cuda}; start at most so many and leave --device out")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if asked == "auto":
        asked = preferred if preferred in here else "cuda" if n_cuda else "cpu"
        if asked != preferred:
            logging.info("No %s here: running on %s", preferred, asked)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UserError(f"device '{asked}' is unknown: choose auto, cpu, cuda or cuda:N")
    if asked not in here:
        raise UserError(f"device '{asked}' is not here: this machine has {n_cuda} CUDA devices; choose auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if asked == "cuda" else torch.device(asked)
