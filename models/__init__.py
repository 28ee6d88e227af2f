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

    The numbers of layers are the checkpoint's, whatever the config says. Raises UserError where anything else that its
    tensors determine disagrees with the config.
    """
    import logging

    from models.backbones import check_backbone_path
    from models.checkpoints import check_weights, describe, fill, read_weights

    if checkpoint_path is None:
        return get_model(model_name, backbone_path, config)
    check_backbone_path(backbone_path)
    weights = read_weights(checkpoint_path)
    layers = {key: value for key, value in describe(weights).items() if key.endswith("_layers")}
    differing = [f"{key} {config.get(key)} -> {value}" for key, value in layers.items() if config.get(key) != value]
    if differing:
        logging.info("Layers as in %s, not as in the config: %s", checkpoint_path, ", ".join(differing))
    config.update(layers)
    check_weights(checkpoint_path, weights, model_name, config)
    model = get_model(model_name, "none", config)
    fill(checkpoint_path, model, weights)
    logging.info("Initializing from checkpoint: %s", checkpoint_path)
    return model


def build_pose_encoder(model_name, config, checkpoint_path=None):
    """The PAE for an APR of SINGLE_SCENE_APRS or MULTI_SCENE_APRS, filled from a checkpoint where one is given.

    Raises UserError where what the checkpoint's tensors determine disagrees with the config.
    """
    import logging

    from models.checkpoints import check_weights, fill, read_weights
    from models.pose_encoder import MultiScenePoseEncoder, PoseEncoder

    shallow_mlp = config.get("shallow_mlp", False)
    if model_name in MULTI_SCENE_APRS:
        kind, encoder = "multi-scene PAE", MultiScenePoseEncoder(config["hidden_dim"], shallow_mlp)
    else:
        kind = "single-scene PAE"
        encoder = PoseEncoder(config["hidden_dim"], config.get("apply_positional_encoding", True), shallow_mlp)
    if checkpoint_path is not None:
        weights = read_weights(checkpoint_path)
        check_weights(checkpoint_path, weights, kind, config)
        fill(checkpoint_path, encoder, weights)
        logging.info("Initializing encoder from checkpoint: %s", checkpoint_path)
    return encoder
