"""Absolute pose regressors (APRs) and camera pose auto-encoders (PAEs)."""

APR_NAMES = ("posenet", "ms-transposenet", "ems-transposenet")
# The APRs that return latents, which a PAE or a refiner needs; the published ms-transposenet returns none.
SINGLE_SCENE_APRS = ("posenet",)
MULTI_SCENE_APRS = ("ems-transposenet",)


def get_model(model_name, backbone_path, config):
    """Build an APR by its published name.

    model_name: one of APR_NAMES.
    backbone_path: a weights file, 'imagenet' (downloaded) or 'none' (random initialisation).
    config: mapping with the model's hyper-parameters, as in a section of config.json.

    Every APR takes {'img': N x 3 x H x W, 'scene': N scene indices or None} and returns {'pose': N x 7,
    'latent_x': N x hidden_dim, 'latent_q': N x hidden_dim}; multi-scene models add 'scene_log_distr': N x num_scenes,
    and ms-transposenet has no latents.

    Raises UserError for an unknown name or weights that cannot be used.
    """
    # Imported here, so that the scripts answer -h before PyTorch is loaded.
    from models.ms_transformer import EMSTransPoseNet, MSTransPoseNet
    from models.posenet import PoseNet
    from util.errors import UserError

    classes = dict(zip(APR_NAMES, (PoseNet, MSTransPoseNet, EMSTransPoseNet)))
    if model_name not in classes:
        raise UserError(f"unknown model '{model_name}': choose one of {', '.join(APR_NAMES)}")
    return classes[model_name](config, backbone_path)


def load_apr(model_name, backbone_path, config, checkpoint_path=None):
    """`get_model`, filled from a checkpoint where one is given; the checkpoint brings the backbone then.

    The numbers of layers are the checkpoint's, whatever the config says. Its convolutions run channels-last, which takes
    a CPU about half the time. Raises UserError where anything else that the checkpoint's tensors determine disagrees with
    the config.
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
    """Let an APR keep the origin, 3 numbers, that its positions are relative to; for None it has none, as published APRs.

    It is for positions far from the coordinates' own origin, such as UTM's. The APR's `origin` is then a part of its
    weights, 3 numbers (float64), and whoever shows its positions adds it; losses, PAEs and refinement work without it.
    """
    import torch

    apr.origin = None if origin is None else torch.as_tensor(origin, dtype=torch.double, device=next(apr.parameters()).device)


def build_pose_encoder(model_name, config, checkpoint_path=None):
    """The PAE for an APR of SINGLE_SCENE_APRS or MULTI_SCENE_APRS, filled from a checkpoint where one is given, whose
    octaves count then.

    Raises UserError where anything else that the checkpoint's tensors determine disagrees with the config.
    """
    from models.checkpoints import describe, fill, read_checkpoint
    from models.pose_encoder import OCTAVES, MultiScenePoseEncoder, PoseEncoder

    multi_scene = model_name in MULTI_SCENE_APRS
    config = {"shallow_mlp": False, "apply_positional_encoding": True, "octaves": OCTAVES, **config}
    if checkpoint_path is not None:
        weights = read_checkpoint(checkpoint_path, "multi-scene PAE" if multi_scene else "single-scene PAE", config)
        config["octaves"] = describe(weights).get("octaves", OCTAVES)
    if multi_scene:
        encoder = MultiScenePoseEncoder(config["hidden_dim"], config["num_scenes"], config["shallow_mlp"], config["octaves"])
    else:
        encoder = PoseEncoder(config["hidden_dim"], config["apply_positional_encoding"], config["shallow_mlp"], config["octaves"])
    if checkpoint_path is not None:
        fill(checkpoint_path, encoder, weights)
    return encoder
