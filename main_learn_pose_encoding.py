"""Train or test a camera pose auto-encoder (PAE) for a single-scene APR."""
from engine.run import about, parser, run_main, start
from models import SINGLE_SCENE_APRS


def main(description=__doc__, models=SINGLE_SCENE_APRS):
    options = parser(description, models)
    options.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT",
                         help="the weights of the APR, the PAE's teacher")
    options.add_argument("--encoder_checkpoint_path", metavar="FILE.pth",
                         help="the PAE's weights to start from in training, to test in testing (default: none in "
                              "training)")
    args = options.parse_args()
    run = start(args, "_pose_encoder", ("pose_encoder",))

    from engine.report import scene_names_of
    from models import build_pose_encoder, freeze, load_apr
    from util.errors import UserError

    if args.mode == "test" and args.encoder_checkpoint_path is None:
        raise UserError("a test needs --encoder_checkpoint_path, the weights to test")
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
    from engine.evaluation import compute_latents, latent_batches, one_thread
    from models.checkpoints import fingerprint
    from models.refinement import queries_of
    from util.losses import CameraPoseLoss

    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, scene_names=scene_names, origin=apr.origin)
    log_summary(args.labels_file, dataset.labels)
    latents = compute_latents(run, apr, dataset)
    encoder.apr.copy_(fingerprint(apr))
    teacher = queries_of(latents)
    poses, teacher_latents, scenes = (teacher[key] for key in ("pose", "latents", "scene"))  # the true poses here
    if args.encoder_checkpoint_path is None:
        encoder.fit_poses(poses, scenes)
    # Fit the noise only on frames whose scene the APR estimates correctly. If most are wrong, the order of scenes is
    # unknown: use all frames.
    true_scenes = torch.tensor(dataset.scenes).to(run.device) if "scene" in latents else scenes
    scene_is_correct = scenes == true_scenes
    if scene_is_correct.float().mean() < 0.5:
        scene_is_correct[:] = True
    pae_input = "pose" if run.config["pae_input"] == "true" else "estimate"
    pose_loss = CameraPoseLoss(run.config).to(run.device)

    def step(batch):
        latent_x, latent_q = encoder(batch[pae_input], batch.get("scene"))
        pose = apr.regress(latent_x, latent_q)
        loss = (F.mse_loss(latent_x, batch["latent_x"]) + F.mse_loss(latent_q, batch["latent_q"])
                + pose_loss(pose, batch["pose"]))
        return loss, pose

    def fit_noise():
        encoder.fit_noise(poses[scene_is_correct], scenes[scene_is_correct], teacher_latents[scene_is_correct])

    validate = None
    if args.val_labels_file is not None:
        val_dataset = CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=scene_names,
                                        origin=apr.origin)
        validation = compute_latents(run, apr, val_dataset)

        def validate():
            return apr.regress(*encoder(validation["estimate"], validation.get("scene"))), validation["pose"]

    with one_thread():
        training.train(run, encoder, pose_loss, latent_batches(latents, run.config["batch_size"], run.seed), step,
                       about(run, "pose encoder of " + args.model_name, scene_names), fit_noise, validate)


def test(run, args, apr, encoder, scene_names):
    """Test a PAE: the errors of the poses that the APR's heads regress from the encoded estimates."""
    from datasets.camera_poses import CameraPoseDataset
    from engine.evaluation import evaluate
    from engine.report import report
    from models import infer
    from models.checkpoints import check_fingerprint

    check_fingerprint(args.encoder_checkpoint_path, encoder.apr, apr, args.apr_checkpoint_path)
    encoder.eval()
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, scene_names=scene_names, origin=apr.origin)

    def estimate(batch):
        result = infer(apr, batch["img"])
        pose = apr.regress(*encoder(result["pose"], result.get("scene")))
        return {**result, "pose": pose, "apr_pose": result["pose"]}

    report(run, args.encoder_checkpoint_path, dataset, evaluate(run, estimate, dataset), scene_names)


if __name__ == "__main__":
    run_main(main)
