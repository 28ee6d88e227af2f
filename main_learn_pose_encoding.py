"""Train or test a camera pose auto-encoder (PAE) for a single-scene APR."""
from models import SINGLE_SCENE_APRS
from util import cli


def main(description=__doc__, models=SINGLE_SCENE_APRS):
    parser = cli.parser(description, models)
    parser.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT", help="the weights of the APR, the PAE's teacher")
    parser.add_argument("--encoder_checkpoint_path", metavar="FILE.pth",
                        help="the PAE's weights to start from in training, to test in testing (default: none in training)")
    args = parser.parse_args()
    run = cli.start(args, "_pose_encoder", ("pose_encoder",))

    import torch
    import torch.nn.functional as F

    from datasets.camera_poses import CameraPoseDataset
    from datasets.labels import log_summary
    from models import build_pose_encoder, load_apr
    from models.checkpoints import check_fingerprint, fingerprint
    from util import engine
    from util.errors import UserError
    from util.latents import compute_latents, freeze, infer, latent_batches, latent_transform, n_views, one_thread, queries_of
    from util.losses import CameraPoseLoss
    from util.report import report, scene_names_of

    config = run.config
    if args.mode == "test" and args.encoder_checkpoint_path is None:
        raise UserError("a test needs --encoder_checkpoint_path, the weights to test")

    apr = load_apr(args.model_name, args.backbone_path, config, args.apr_checkpoint_path).to(run.device)
    encoder = build_pose_encoder(args.model_name, config, args.encoder_checkpoint_path).to(run.device)
    freeze(apr)
    names = scene_names_of(args.model_name, config, args.apr_checkpoint_path)
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, latent_transform(run), scene_names=names, seed=run.seed,
                                origin=apr.origin)

    if args.mode == "train":
        log_summary(args.labels_file, dataset.labels)
        encoder.apr.copy_(fingerprint(apr))
        latents = compute_latents(run, apr, dataset, n_views(config))
        teacher = queries_of(latents)
        poses, teacher_latents, scenes = (teacher[key] for key in ("pose", "latents", "scene"))  # the true poses here
        if args.encoder_checkpoint_path is None:
            encoder.fit_poses(poses, scenes)
        # Not of frames whose scene the APR tells wrong, unless the scenes' order is not known.
        true_scenes = torch.tensor(dataset.scenes).repeat(n_views(config)).to(run.device) if "scene" in latents else scenes
        of_noise = scenes == true_scenes
        if of_noise.float().mean() < 0.5:
            of_noise[:] = True
        pae_input = "pose" if config.get("pae_input", "estimated") == "true" else "estimate"
        pose_loss = CameraPoseLoss(config).to(run.device)

        def step(batch):
            latent_x, latent_q = encoder(batch[pae_input], batch.get("scene"))
            pose = apr.regress(latent_x, latent_q)
            loss = (F.mse_loss(latent_x, batch["latent_x"]) + F.mse_loss(latent_q, batch["latent_q"])
                    + pose_loss(pose, batch["pose"]))
            return loss, pose

        def fit_noise():
            encoder.fit_noise(poses[of_noise], scenes[of_noise], teacher_latents[of_noise])

        if args.val_labels_file is not None:
            seen = compute_latents(run, apr, CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=names,
                                                               origin=apr.origin))

            def validate():
                return apr.regress(*encoder(seen["estimate"], seen.get("scene"))), seen["pose"]

        batches = latent_batches(latents, config["batch_size"], run.seed, n_views(config))
        with one_thread():
            engine.train(run, encoder, pose_loss, batches, step, cli.about(run, "pose encoder of " + args.model_name, names),
                         before_save=fit_noise, validate=validate if args.val_labels_file is not None else None)
    else:
        check_fingerprint(args.encoder_checkpoint_path, encoder.apr, apr, args.apr_checkpoint_path)
        encoder.eval()

        def estimate(batch):
            result = infer(apr, batch["img"])
            pose = apr.regress(*encoder(result["pose"], result.get("scene")))
            return {**result, "pose": pose, "apr_pose": result["pose"]}

        results = engine.evaluate(run, estimate, dataset)
        report(run, args.encoder_checkpoint_path, dataset, results, names)


if __name__ == "__main__":
    cli.run(main)
