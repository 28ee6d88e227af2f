"""Absolute pose regressors (APRs) and camera pose auto-encoders (PAEs): names, and functions to build and run them."""

APR_NAMES = ("posenet", "ms-transposenet", "ems-transposenet")
# The APRs that return latents, which PAEs and refinement need. The published ms-transposenet returns none.
SINGLE_SCENE_APRS = ("posenet",)
MULTI_SCENE_APRS = ("ems-transposenet",)
# The solvers of `main_refine_apr.py optimize`, see models/refinement.py.
SOLVERS = (
    "kernel",
    "linear",
    "inversion",
    "mlp",
    "simplex",
)
# The solvers that use all references of a scene and the noise covariance, which published PAEs do not hold.
SOLVERS_WITH_NOISE = (
    "linear",
    "inversion",
)


def get_model(model_name, backbone_path, config):
    """Build an APR by its published name.

    model_name: one of APR_NAMES.
    backbone_path: a weights file, 'imagenet' (downloaded) or 'none' (random initialisation).
    config: mapping with the model's hyper-parameters, as in a section of config.json.

    Every APR takes {'img': N x 3 x H x W, 'scene': N scene indices or None} and returns {'pose': N x 7,
    'latent_x': N x hidden_dim, 'latent_q': N x hidden_dim}. Multi-scene models add 'scene_log_distr': N x num_scenes.
    ms-transposenet returns no latents.

    Raises UserError for an unknown name and for weights that cannot be used.
    """
    # Imported here, so that the scripts answer -h before PyTorch is loaded.
    from models.ms_transformer import EMSTransPoseNet, MSTransPoseNet
    from models.posenet import PoseNet
    from util.config import Config
    from util.errors import UserError

    classes = dict(zip(APR_NAMES, (PoseNet, MSTransPoseNet, EMSTransPoseNet)))
    if model_name not in classes:
        raise UserError(f"unknown model '{model_name}': choose one of {', '.join(APR_NAMES)}")
    return classes[model_name](Config(config), backbone_path)


def load_apr(model_name, backbone_path, config, checkpoint_path=None):
    """Build an APR with `get_model`, and fill it from a checkpoint if one is given.

    The checkpoint then also fills the backbone, and its numbers of layers replace those of `config`. The convolutions
    run channels-last, which takes a CPU about half the time.

    Raises UserError if the checkpoint's tensors disagree with the config in anything but the numbers of layers.
    """
    import logging

    import torch

    from models.backbones import check_backbone_path
    from models.checkpoints import describe, fill, read_checkpoint

    if checkpoint_path is None:
        model = get_model(model_name, backbone_path, config)
    else:
        check_backbone_path(backbone_path)
        weights = read_checkpoint(checkpoint_path, model_name, config)
        layers = {key: value for key, value in describe(weights).items() if key.endswith("_layers")}
        differing = [f"{key} {config.get(key)} -> {value}" for key, value in layers.items() if config.get(key) != value]
        if differing:
            logging.info("Layers as in %s, not as in the config: %s", checkpoint_path, ", ".join(differing))
        config.update(layers)
        model = get_model(model_name, "none", config)
        if "origin" in weights:
            set_origin(model, torch.zeros(3))  # the checkpoint fills it
        fill(checkpoint_path, model, weights)
    return model.to(memory_format=torch.channels_last)


def set_origin(apr, origin):
    """Set the origin that an APR's positions are relative to: 3 numbers in metres, or None for none, as published APRs.

    An origin is for positions far from 0, such as UTM coordinates. It becomes a part of the APR's weights (`origin`,
    float64). Code that shows positions adds it. Losses, PAEs and refinement work without it.
    """
    import torch

    device = next(apr.parameters()).device
    apr.origin = None if origin is None else torch.as_tensor(origin, dtype=torch.double, device=device)


def build_pose_encoder(model_name, config, checkpoint_path=None):
    """Build the PAE for an APR of SINGLE_SCENE_APRS or MULTI_SCENE_APRS, and fill it from a checkpoint if one is given.

    The checkpoint's number of octaves replaces that of `config`.

    Raises UserError if the checkpoint's tensors disagree with the config in anything but the octaves.
    """
    from models.checkpoints import describe, fill, read_checkpoint
    from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder
    from util.config import DEFAULTS, Config

    multi_scene = model_name in MULTI_SCENE_APRS
    config = Config(config)
    if checkpoint_path is not None:
        weights = read_checkpoint(checkpoint_path, "multi-scene PAE" if multi_scene else "single-scene PAE", config)
        config["octaves"] = describe(weights).get("octaves", DEFAULTS["octaves"])
    encoder_dim, shallow_mlp, octaves = config["hidden_dim"], config["shallow_mlp"], config["octaves"]
    if multi_scene:
        encoder = MultiScenePoseEncoder(encoder_dim, config["num_scenes"], shallow_mlp, octaves)
    else:
        encoder = PoseEncoder(encoder_dim, config["apply_positional_encoding"], shallow_mlp, octaves)
    if checkpoint_path is not None:
        fill(checkpoint_path, encoder, weights)
    return encoder


def load_pose_encoder(model_name, config, path, apr, apr_path):
    """Build an APR's PAE from a file with `build_pose_encoder`, frozen, on the APR's device.

    Raises UserError, too, for a PAE of another APR. apr_path: the APR's file, for this message.
    """
    from models.checkpoints import check_fingerprint

    encoder = build_pose_encoder(model_name, config, path).to(next(apr.parameters()).device)
    check_fingerprint(path, encoder.apr, apr, apr_path)
    freeze(encoder)
    return encoder


def folded(apr):
    """Return a frozen copy of an APR for `infer`, faster by a tenth to a half: batch norms become part of convolutions.

    Its outputs differ from the APR's by rounding. Its state dict is no checkpoint.
    """
    import copy

    from models.backbones import fold_batch_norms

    network = copy.deepcopy(apr)
    freeze(network)
    fold_batch_norms(network)
    return network


def infer(apr, img):
    """Return an APR's outputs for images of unknown scene, N x 3 x H x W.

    For multi-scene models they include 'scene': N, the index of the most likely scene.
    """
    result = apr({"img": img, "scene": None})
    if "scene_log_distr" in result:
        result["scene"] = result["scene_log_distr"].argmax(dim=1)
    return result


def freeze(*modules):
    """Put modules into eval mode and turn the gradients of their parameters off."""
    for module in modules:
        module.eval().requires_grad_(False)
