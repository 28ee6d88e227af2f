"""predict --watch: the poses of images as they arrive in a folder, such as from a camera."""
import contextlib
import csv
import io
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch

from datasets.image_cache import read_frame
from datasets.images import IMAGE_EXTENSIONS, UnreadableImage, path_is, read_header
from datasets.labels import natural_key
from datasets.resources import n_cores
from datasets.transforms import SIZE, test_transform
from datasets.unlabelled import find_images
from engine.evaluation import milliseconds, to_device
from engine.novelty import corrected
from engine.report import image_table
from models import infer
from util import processes, signals
from util.errors import UserError
from util.files import lock, writing
from util.log import DETAIL, quiet
from util.progress import progress

INTERVAL = 0.5  # seconds between two looks into the folder
TRIES = 5  # times that an image which stays the same is read before it is said to be unreadable


def watch(run, apr, encoder, encoder_path, scene_names, folder, as_stored=False):
    """Predict the images of a folder and of its subfolders, and those that arrive, until SIGINT or SIGTERM.

    Rows are appended to run.predictions_path, or printed where that is -, as soon as an image is predicted. Images that
    the file has already are left out. An image is taken when it has not changed between two looks, and once.

    encoder: the PAE, its path encoder_path, or None. scene_names: as for `report`. as_stored: as for Images.

    Raises UserError for a file with other columns, or that another process writes.
    """
    if processes.world_size() > 1:
        raise UserError("--watch runs in one process; start it without torchrun")
    if encoder is not None and not len(encoder.memory):
        corrected(run, encoder, encoder_path, {})  # says why it has no novelty
        encoder = None
    read = _reader(as_stored)
    predict = _predictor(run, apr, encoder, encoder_path, scene_names)
    header = _line(predict(["an image"], [np.zeros((SIZE, SIZE, 3), np.uint8)]).columns)  # and warms up
    _, left_out = find_images(folder)
    if left_out:
        logging.info("Left out of %s: %s", folder, left_out)
    n = n_turned = 0
    with (signals.deferred() as received, _appending(run.predictions_path, header) as (known, append),
          ThreadPoolExecutor(n_cores()) as pool, progress(desc="watching", unit="frame") as bar):
        arrivals = Arrivals(folder, known)
        logging.info("Watching %s for images; Ctrl-C ends it", folder)
        while not received:
            ready, size = arrivals.look(), run.config["test_batch_size"]
            for part in (ready[i:i + size] for i in range(0, len(ready), size)):
                found = dict(zip(part, pool.map(read, (os.path.join(folder, name) for name in part)), strict=True))
                images = {name: image for name, (image, _) in found.items() if image is not None}
                if images:
                    append(predict(list(images), list(images.values())))
                arrivals.done(images)
                for name in found.keys() - images.keys():
                    arrivals.failed(name, found[name][1])
                n, n_turned = n + len(images), n_turned + sum(found[name][1] for name in images)
                bar.update(len(images))
                if received:
                    break
            time.sleep(0 if received else INTERVAL)
    if n_turned:
        logging.info("EXIF orientation: %d of %d images had one, and were %s", n_turned, n,
                     "left as stored (--as_stored)" if as_stored else "turned upright")
    logging.info("Watched %s: %d images predicted, %d not readable", folder, n, arrivals.n_unreadable())


class Arrivals:
    """The images of a folder and its subfolders, as they arrive there. Names are paths below the folder."""

    def __init__(self, folder, known=()):
        """known: names of images that are done already."""
        self.folder, self.finished = folder, set(known)
        self.pending = {}  # {name: [its size and time of change at the last look, how often it was unreadable since]}

    def look(self):
        """Names of images to read now, in natural order: those that have not changed since the last look."""
        ready = []
        for name in sorted(self._names(), key=natural_key):
            try:
                status = os.stat(os.path.join(self.folder, name))
            except OSError:  # it has gone
                continue
            signature = status.st_size, status.st_mtime_ns
            before, tries = self.pending.get(name, (None, 0))
            if signature != before:
                self.pending[name] = [signature, 0]
            elif tries < TRIES:
                ready.append(name)
        return ready

    def done(self, names):
        """Note that images are predicted."""
        for name in names:
            self.finished.add(name)
            del self.pending[name]

    def failed(self, name, why):
        """Note that an image could not be read. The last time, until it changes, this is a warning."""
        self.pending[name][1] += 1
        if self.pending[name][1] == TRIES:
            logging.warning("Left out until it changes: %s", why)

    def n_unreadable(self):
        """The number of images that were tried for the last time."""
        return sum(tries >= TRIES for _, tries in self.pending.values())

    def _names(self):
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                name = os.path.relpath(os.path.join(folder, file), self.folder)
                if path_is(file, IMAGE_EXTENSIONS) and not file.startswith(".") and name not in self.finished:
                    yield name


def _reader(as_stored):
    """A function from a path to (an image under the test transform, whether it has an EXIF orientation).

    For an image that cannot be read it is (None, why).
    """
    def read(path):
        try:
            image = np.asarray(test_transform()(read_frame(path, upright=not as_stored)))
            return image, read_header(path)[2] > 1
        except UnreadableImage as error:
            return None, str(error)

    return read


def _predictor(run, apr, encoder, encoder_path, scene_names):
    """A function from N names and images, 224 x 224 x 3 (uint8), to a table of predictions."""
    @torch.inference_mode()
    def predict(names, images):
        batch = to_device({"img": torch.from_numpy(np.stack(images))}, run.device)
        elapsed_ms, result = milliseconds(lambda: infer(apr, batch["img"]), run.device)
        results = {key: value.cpu() for key, value in result.items()}
        results["milliseconds"] = torch.full((len(names),), elapsed_ms / len(names))
        with quiet():  # what a prediction logs once is logged here for every image that arrives
            if encoder is not None:
                results = corrected(run, encoder, encoder_path, results)
            return image_table(run, pd.DataFrame({"img_path": names}), results, scene_names, apr.origin)

    return predict


@contextlib.contextmanager
def _appending(path, header):
    """Within the block, a file of predictions to append to: (names of its images, a function that appends a table).

    path: - is the standard output. header: the line of columns. A new file begins with it; another must have it. Rows
    are in the file when the function returns.
    """
    to_screen = path == "-"
    name = "the standard output" if to_screen else f"--predictions_path {path}"
    with writing(name):
        if to_screen:
            file = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        else:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            file = open(path, "a+", encoding="utf-8", newline="")  # noqa: SIM115 (closed below)

    def write(text):
        with writing(name):
            file.write(text)
            file.flush()

    try:
        known = set() if to_screen else _known(path, file, header)
        if known:
            logging.info("%s has the poses of %d images already, which are left out", path, len(known))
        if to_screen or not file.tell():
            write(header)

        def append(table):
            write(table.to_csv(index=False, header=False, lineterminator="\n"))
            for image in table["img_path"]:
                logging.info("Predicted: %s", image, extra=DETAIL)

        yield known, append
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _known(path, file, header):
    """Names of the images that a file of predictions has. Raises UserError for another file; see `_appending`."""
    if not lock(file):
        raise UserError(f"--predictions_path {path}: another process writes it; name another file")
    file.seek(0)
    try:
        text = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--predictions_path {path}: is no file of predictions; name another") from error
    if text and not text.startswith(header):
        raise UserError(f"--predictions_path {path}: has other columns than {header.rstrip()}, so nothing can be "
                        "appended; name another file")
    if text and not text.endswith("\n"):
        raise UserError(f"--predictions_path {path}: its last row is not complete; delete it")
    return {row[0] for row in list(csv.reader(io.StringIO(text)))[1:]}


def _line(cells):
    """A line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
