"""A trained APR as a function of images, for other programs.

    from engine.localizer import load_localizer

    localizer = load_localizer("weights/apr.pth", encoder="weights/pae.pth")
    result = localizer(["photo.jpg"])
    print(result["position"], result["quaternion"])
"""
import logging
import os

import numpy as np
import torch
from PIL import Image, ImageOps

from datasets.image_cache import read_frame, resize
from datasets.transforms import test_transform, to_input
from engine.novelty import forgotten
from engine.report import scene_names_of, to_world
from engine.run import device_of
from engine.short import config_of, known_settings
from models import folded, infer, load_apr, load_pose_encoder
from models.refinement import queries_of
from util.errors import UserError
from util.rotations import unit_poses


def load_localizer(weights, encoder=None, device="auto", batch_size=32):
    """Load an APR, and its PAE, as a function of images.

    weights, encoder: files, the APR's and its PAE's, or None. device: auto, cpu, cuda or cuda:N.

    Returns localizer(images) -> dict of arrays with a row per image: 'position', N x 3; 'quaternion', N x 4, unit,
    scalar first; for multi-scene models 'scene', N names (indices as text where names are unknown). With a PAE that
    remembers training frames, its poses are corrected, and 'novelty', N, says which to believe; a warning is logged
    for another PAE. images: a list of paths, PIL images, or arrays, height x width x 3 (uint8, RGB). An image with an
    EXIF orientation is turned upright.

    Raises UserError for files that do not fit, and for images that are no such list, or cannot be read.
    """
    model, settings = known_settings(weights, encoder)
    config, device = config_of(model, settings), device_of(device)
    apr = load_apr(model, "none", config, weights).to(device)
    scene_names = scene_names_of(model, config, weights)
    pae = None if encoder is None else load_pose_encoder(model, config, encoder, apr, weights)
    if pae is not None and not len(pae.memory):
        logging.warning("No novelty, and poses are not corrected: %s", forgotten(encoder))
    network = folded(apr)

    @torch.inference_mode()
    def localizer(images):
        if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 4) != 4 or not len(images):
            raise UserError("the localizer takes a list of images, at least one; put a single image in a list")
        parts = [_locate(network, pae, images[i:i + batch_size], device) for i in range(0, len(images), batch_size)]
        result = {key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else ())}
        if "scene" in result:
            result["scene"] = np.array([scene_names[i] if scene_names else str(i) for i in result["scene"]])
        return result

    return localizer


def _locate(apr, pae, images, device):
    """Results as a localizer's, for one batch, with scene indices."""
    pixels = torch.from_numpy(np.stack([np.asarray(test_transform()(_frame(image))) for image in images]))
    output = infer(apr, to_input(pixels.to(device)))
    poses, result = output["pose"], {}
    if pae is not None and len(pae.memory):
        queries = queries_of(output)
        poses, _ = pae.memory.corrected(pae, queries)
        result["novelty"] = pae.memory.novelty(pae, queries).cpu().numpy()
    if "scene" in output:
        result["scene"] = output["scene"].cpu().numpy()
    poses = unit_poses(to_world(poses, apr.origin)).cpu().numpy()
    return {"position": poses[:, :3], "quaternion": poses[:, 3:], **result}


def _frame(image):
    """A path, a PIL image or an array as a PIL image with a shorter side of 256, upright."""
    if isinstance(image, str | os.PathLike):
        return read_frame(image, upright=True)
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an image of {image.dtype}, {image.shape}: an array must be uint8, height x width x 3 "
                            "(RGB)")
        image = Image.fromarray(np.ascontiguousarray(image))
    return resize(ImageOps.exif_transpose(image).convert("RGB"))
