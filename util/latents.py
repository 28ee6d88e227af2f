"""A frozen APR: what it answers to a query, and its latents over a dataset, computed once."""
import contextlib
import logging
import time

import torch

from datasets.camera_poses import epoch_order, test_transform, train_transform
from util import processes
from util.engine import answers, concatenate, frames_of, synchronize


def freeze(*modules):
    """Put modules in eval mode, without gradients of their own."""
    for module in modules:
        module.eval().requires_grad_(False)


def infer(apr, img):
    """An APR's answer to N x 3 x H x W images of unknown scene: its outputs and, of multi-scene models, 'scene', N
    indices of the most likely scene."""
    result = apr({"img": img, "scene": None})
    if "scene_log_distr" in result:
        result["scene"] = result["scene_log_distr"].argmax(dim=1)
    return result


def queries_of(result):
    """What refinement takes of an APR's answer, as `infer` gives it: 'pose' N x 7, 'latents' N x 2 latent_dim (position's, then
    orientation's) and 'scene' N, 0 for single-scene models."""
    scene = result.get("scene", torch.zeros(len(result["pose"]), dtype=torch.long, device=result["pose"].device))
    return {"pose": result["pose"], "latents": torch.cat((result["latent_x"], result["latent_q"]), dim=1), "scene": scene}


def latent_transform(run):
    """The transform of the frames that a PAE or a refiner works on: the tests', or in training with `latent_views` the
    augmentation. run: of cli.start."""
    return train_transform() if run.args.mode == "train" and run.config.get("latent_views", 0) else test_transform()


@contextlib.contextmanager
def one_thread():
    """Compute on one CPU thread, for networks as small as a PAE: their products gain nothing from more, and lose much where
    the cores have other work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@torch.no_grad()
def compute_latents(run, apr, dataset, n_views=1):
    """Run a frozen APR over a dataset once, in batches of `test_batch_size`; or n_views times, over the views that the dataset's
    transform makes in epochs 0 to n_views - 1.

    run: of cli.start. Returns tensors on the device, n_views N rows in the dataset's order, view after view: 'latent_x',
    'latent_q', 'estimate' (the APR's raw pose), 'pose' (the truth), 'row' (the label file's) and, of multi-scene models,
    'scene' (the APR's). Several processes share the frames; the first one returns, the others end.
    """
    if run.args.cache_dir or n_views > 1:
        dataset.cache_frames(run.args.cache_dir, run.config.get("cache_memory_gb"))

    def answer(batch):
        result = infer(apr, batch["img"])
        return {"estimate": result["pose"], "pose": batch["pose"], "row": batch["row"],
                **{key: result[key] for key in ("latent_x", "latent_q", "scene") if key in result}}

    begin = time.perf_counter()
    with dataset.naming_all_unreadable():
        views = [answers(run, frames_of(run, dataset, view), answer, "latents") for view in range(n_views)]
    processes.first_alone()
    latents = {key: value.to(run.device) for key, value in concatenate(views).items()}
    synchronize(run.device)
    seconds, n = time.perf_counter() - begin, len(latents["pose"])
    logging.info("Latents: %d in %.1f s (%.1f frames/s)", n, seconds, n / seconds)
    return latents


def n_views(config):
    """How many views of a frame have latents: `latent_views` augmented ones, else 1, the frame as tests see it."""
    return config.get("latent_views", 0) or 1


def latent_batches(latents, batch_size, seed, n_views=1):
    """A function from an epoch's number to that epoch's batches of rows, shuffled by (seed, epoch) alone. A frame's views
    take turns from epoch to epoch."""
    n_frames = len(latents["pose"]) // n_views

    def batches(epoch):
        order = epoch_order(n_frames, seed, epoch)
        order = (order + (epoch + order) % n_views * n_frames).to(latents["pose"].device)
        return [{key: rows[part] for key, rows in latents.items()} for part in order.split(batch_size)]

    return batches
