"""Evaluation: a model over a dataset, timed for tests, or once for the latents that a PAE or a refiner learns from."""
import contextlib
import logging
import sys
import time

import torch

from datasets.loaders import test_batches
from datasets.transforms import to_input
from models import folded, infer
from models.refinement import queries_of
from util import processes
from util.metrics import pose_err
from util.progress import progress
from util.seeds import epoch_order

N_TIMED, N_WARM_UP = 20, 3  # single frames that a test times, and calls before them


@torch.inference_mode()
def evaluate(run, estimate, dataset):
    """Run a function over a dataset in batches of `test_batch_size`, and time it.

    run: an engine.run.Run. estimate: batch on the device -> dict of N x ... tensors.

    Returns the dict of all frames' tensors on the CPU, with 'milliseconds', N: each frame's part of its batch's time,
    and 'milliseconds_alone', M: the time of each of the first M frames by itself. Both exclude decoding. Several
    processes shard the frames; rank 0 returns, the others exit.
    """
    _take_decoded(run, dataset)
    results, singles, errors = [], [], []
    n_frames = len(processes.shard(range(len(dataset))))
    with dataset.report_all_unreadable(), progress(total=n_frames, unit="frame") as bar:
        for batch in begun(test_loader(run, dataset)):
            batch = to_device(batch, run.device)
            singles += [{key: value[i:i + 1] for key, value in batch.items()}
                        for i in range(min(N_TIMED - len(singles), len(batch["img"])))]
            elapsed_ms, result = milliseconds(lambda: estimate(batch), run.device)  # noqa: B023 (called at once)
            size = len(batch["img"])
            result["milliseconds"] = torch.full((size,), elapsed_ms / size)
            results.append({key: value.cpu() for key, value in result.items()})
            if not bar.disable and "pose" in batch:
                errors.append(torch.stack(pose_err(results[-1]["pose"], batch["pose"].cpu())))
                medians = torch.cat(errors, dim=1).quantile(0.5, dim=1)
                bar.set_postfix_str("median {:.2f} m, {:.2f} deg".format(*medians))
            bar.update(size)
    results = processes.gather_rows(concatenate(results))
    processes.continue_on_first()
    # Single frames come last, when no worker decodes any more. The first calls only warm up.
    alone = [milliseconds(lambda: estimate(frame), run.device)[0]  # noqa: B023
             for frame in [singles[0]] * N_WARM_UP + singles]
    log_memory(run.device)
    return {**results, "milliseconds_alone": torch.tensor(alone[N_WARM_UP:])}


def log_memory(device):
    """Log the largest memory that this process has had, and the largest of its tensors on a GPU."""
    with contextlib.suppress(ImportError):  # a system without the module
        import resource

        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
        of_gpu = ""
        if device.type == "cuda":
            of_gpu = f", on the GPU {torch.cuda.max_memory_allocated(device) / 2 ** 30:.2f} GiB"
        logging.info("Peak memory: %.2f GiB%s", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, of_gpu)


@torch.no_grad()
def compute_latents(run, apr, dataset):
    """Run a frozen APR over a dataset once, in batches of `test_batch_size`.

    run: an engine.run.Run.

    Returns tensors on the device with a row per frame, in the dataset's order: 'latent_x', 'latent_q', 'estimate' (the
    APR's raw pose), 'pose' (the true one), 'row' (of the label file) and, for multi-scene models, 'scene' (the APR's).
    Several processes shard the frames; rank 0 returns, the others exit.
    """
    _take_decoded(run, dataset)
    network = folded(apr)

    def outputs(batch):
        result = infer(network, batch["img"])
        return {"estimate": result["pose"], "pose": batch["pose"], "row": batch["row"],
                **{key: result[key] for key in ("latent_x", "latent_q", "scene") if key in result}}

    begin = time.perf_counter()
    with dataset.report_all_unreadable():
        latents = predict(run, test_loader(run, dataset), outputs, "latents")
    processes.continue_on_first()
    dataset.cache = None  # its memory
    latents = {key: value.to(run.device) for key, value in latents.items()}
    synchronize(run.device)
    seconds, n = time.perf_counter() - begin, len(latents["pose"])
    logging.info("Latents: %d in %.1f s (%.1f frames/s)", n, seconds, n / seconds)
    return latents


def _take_decoded(run, dataset):
    """Let a dataset's frames come from the file of --cache_dir, or those that are decoded already from memory."""
    if run.cache_dir:
        dataset.cache_frames(run.cache_dir)
    elif run.decoded_ahead is not None:
        dataset.cache = run.decoded_ahead(dataset.paths)
        if dataset.cache is not None:
            run.decoded_ahead = None


def frames_of(latents):
    """Frames as LatentMemory takes them, from what `compute_latents` returns: queries with 'truth', the true poses."""
    return {**queries_of({**latents, "pose": latents["estimate"]}), "truth": latents["pose"]}


def latent_batches(latents, batch_size, seed):
    """A function from an epoch's number to its batches of rows, shuffled by (seed, epoch) alone."""
    def batches(epoch):
        order = epoch_order(len(latents["pose"]), seed, epoch).to(latents["pose"].device)
        return [{key: rows[part] for key, rows in latents.items()} for part in order.split(batch_size)]

    return batches


def test_loader(run, dataset):
    """A loader of this rank's shard of a dataset, in batches of `test_batch_size`."""
    return test_batches(dataset, run.config["test_batch_size"], run.config["n_workers"])


def predict(run, batches, function, description):
    """Apply a function to every batch of `test_loader`: batch on the device -> dict of N x ... tensors.

    Returns the dict of all frames' tensors, of all ranks, in order. description: of the progress bar.
    """
    n_batches = len(batches) if hasattr(batches, "__len__") else None
    bar = progress(begun(batches), total=n_batches, desc=description, unit="batch")
    results = [function(to_device(batch, run.device)) for batch in bar]
    return processes.gather_rows(concatenate(results))


def begun(batches):
    """An iterator over a loader's batches. While workers decode the first, it loads the library of later pictures."""
    iterator = iter(batches)
    import matplotlib.figure  # noqa: F401

    return iterator


def concatenate(results):
    """Join dicts of N_i x ... tensors row-wise; {} for an empty list."""
    return {key: torch.cat([result[key] for result in results]) for key in (results[0] if results else ())}


def to_device(batch, device):
    """Move a batch to a device, its images normalised as the networks take them.

    Tensors in a worker's shared memory are copied: each is an open file for as long as it is kept.
    """
    batch = {key: value.to(device, non_blocking=True, copy=value.is_shared()) for key, value in batch.items()}
    return {**batch, "img": to_input(batch["img"])} if "img" in batch else batch


def milliseconds(function, device):
    """Time a function on a device: (milliseconds, what it returns)."""
    synchronize(device)
    begin = time.perf_counter()
    result = function()
    synchronize(device)
    return 1000 * (time.perf_counter() - begin), result


def synchronize(device):
    """Wait until a device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def threads(n):
    """Within the block, compute on n CPU threads.

    Networks as small as a PAE gain nothing from more than one, and lose much where the cores have other work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
