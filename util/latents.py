"""A frozen APR: what it answers to a query, and its latents over a dataset, computed once."""
import torch
from tqdm import tqdm

from datasets.camera_poses import epoch_order, test_batches
from util.engine import to_device


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


@torch.no_grad()
def compute_latents(apr, dataset, config, device):
    """Run a frozen APR over a dataset once, in batches.

    Returns tensors on the device, N rows in the dataset's order: 'latent_x', 'latent_q', 'estimate' (the APR's raw
    pose), 'pose' (the truth) and, of multi-scene models, 'scene' (the APR's).
    """
    results = []
    batches = test_batches(dataset, config["batch_size"], config["n_workers"])
    for batch in tqdm(batches, desc="latents", unit="batch", disable=None):
        batch = to_device(batch, device)
        result = infer(apr, batch["img"])
        results.append({"estimate": result["pose"], "pose": batch["pose"],
                        **{key: result[key] for key in ("latent_x", "latent_q", "scene") if key in result}})
    return {key: torch.cat([result[key] for result in results]) for key in results[0]}


def latent_batches(latents, batch_size, seed):
    """A function from an epoch's number to that epoch's batches of rows, shuffled by (seed, epoch) alone."""
    def batches(epoch):
        order = epoch_order(len(latents["pose"]), seed, epoch).to(latents["pose"].device)
        return [{key: rows[part] for key, rows in latents.items()} for part in order.split(batch_size)]

    return batches
