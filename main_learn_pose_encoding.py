"""Train or test a camera pose auto-encoder (PAE) for a single-scene APR."""
from engine.run import about, parser, run_main, start
from models import SINGLE_SCENE_APRS
from util.errors import UserError


def main(description=__doc__, models=SINGLE_SCENE_APRS):
    options = parser(description, models)
    options.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT",
                         help="the weights of the APR, the PAE's teacher")
    options.add_argument("--encoder_checkpoint_path", metavar="FILE.pth",
                         help="the PAE's weights to start from in training, to test in testing (default: none in "
                              "training)")
    args = options.parse_args()
    if args.mode == "test" and args.encoder_checkpoint_path is None:
        raise UserError("a test needs --encoder_checkpoint_path, the weights to test")
    run = start(args, "_pose_encoder", ("pose_encoder",), ahead=True)

    from engine.report import scene_names_of
    from models import build_pose_encoder, freeze, load_apr

    apr = load_apr(args.model_name, args.backbone_path, run.config, args.apr_checkpoint_path).to(run.device)
    encoder = build_pose_encoder(args.model_name, run.config, args.encoder_checkpoint_path).to(run.device)
    freeze(apr)
    scene_names = scene_names_of(args.model_name, run.config, args.apr_checkpoint_path)
    {"train": train, "test": test}[args.mode](run, args, apr, encoder, scene_names)


def train(run, args, apr, encoder, scene_names):
    """Train a PAE on the latents of its frozen teacher, which runs over the frames once."""
    import torch
    import torch.nn.functional as F

    from datasets.camera_poses import CameraPoseDataset
    from datasets.labels import log_summary
    from engine import training
    from engine.evaluation import compute_latents, frames_of, latent_batches, threads
    from engine.novelty import warn_of_few_frames
    from models.checkpoints import fingerprint
    from util.losses import CameraPoseLoss

    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, scene_names=scene_names, origin=apr.origin)
    log_summary(args.labels_file, dataset.labels)
    latents = compute_latents(run, apr, dataset)
    encoder.apr.copy_(fingerprint(apr))
    frames = frames_of(latents)
    scenes = frames["scene"]
    if args.encoder_checkpoint_path is None:
        encoder.fit_poses(frames["truth"], scenes)
    # Fit noise and memory only on frames whose scene the APR estimates correctly. If most are wrong, the order of
    # scenes is unknown: use all frames.
    true_scenes = torch.tensor(dataset.scenes).to(run.device) if "scene" in latents else scenes
    scene_is_correct = scenes == true_scenes
    if scene_is_correct.float().mean() < 0.5:
        scene_is_correct[:] = True
    warn_of_few_frames(scenes[scene_is_correct], scene_names)
    pae_input = "pose" if run.config["pae_input"] == "true" else "estimate"
    pose_loss = CameraPoseLoss(run.config).to(run.device)

    def step(batch):
        latent_x, latent_q = encoder(batch[pae_input], batch.get("scene"))
        pose = apr.regress(latent_x, latent_q)
        loss = (F.mse_loss(latent_x, batch["latent_x"]) + F.mse_loss(latent_q, batch["latent_q"])
                + pose_loss(pose, batch["pose"]))
        return loss, pose

    validate, validation = None, None
    if args.val_labels_file is not None:
        val_dataset = CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=scene_names,
                                        origin=apr.origin)
        validation = compute_latents(run, apr, val_dataset)

        def validate():
            return apr.regress(*encoder(validation["estimate"], validation.get("scene"))), validation["pose"]

    def fit_latents():
        encoder.fit_latents({key: rows[scene_is_correct] for key, rows in frames.items()})
        if validation is not None:
            encoder.memory.calibrate(encoder, frames_of(validation))

    with threads(1):
        training.train(run, encoder, pose_loss, latent_batches(latents, run.config["batch_size"], run.seed), step,
                       about(run, "pose encoder of " + args.model_name, scene_names), fit_latents, validate)


def test(run, args, apr, encoder, scene_names):
    """Test a PAE: the errors of the poses that the APR's heads regress from the encoded estimates."""
    from datasets.camera_poses import CameraPoseDataset
    from engine.evaluation import evaluate
    from engine.novelty import check_max_novelty, novelty_of
    from engine.report import report
    from models import folded, infer
    from models.checkpoints import check_fingerprint

    check_fingerprint(args.encoder_checkpoint_path, encoder.apr, apr, args.apr_checkpoint_path)
    check_max_novelty(run, encoder, args.encoder_checkpoint_path)
    encoder.eval()
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, scene_names=scene_names, origin=apr.origin)
    network = folded(apr)

    def estimate(batch):
        result = infer(network, batch["img"])
        pose = apr.regress(*encoder(result["pose"], result.get("scene")))
        return {**result, "pose": pose, "apr_pose": result["pose"]}

    results = evaluate(run, estimate, dataset)
    novelty = novelty_of(run, encoder, args.encoder_checkpoint_path, {**results, "pose": results["apr_pose"]})
    report(run, args.encoder_checkpoint_path, dataset, {**results, **novelty}, scene_names)


if __name__ == "__main__":
    run_main(main)
