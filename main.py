"""Train or test an absolute pose regressor (APR), or predict the poses of one's own images."""
import logging

from models import APR_NAMES, SINGLE_SCENE_APRS
from util import cli


def main():
    parser = cli.parser(__doc__, APR_NAMES, modes=("train", "test", "predict"))
    parser.add_argument("--checkpoint_path", metavar="FILE.pth",
                        help="the APR's weights: to start from in training, else required (default: none in training)")
    parser.add_argument("--as_stored", action="store_true",
                        help="in predict: leave images as stored that have an EXIF orientation (default: turn them upright)")
    args = parser.parse_args()
    run = cli.start(args)

    import torch
    import torch.nn.functional as F

    from datasets.camera_poses import CameraPoseDataset, Images, test_transform, train_batches, train_transform
    from datasets.labels import far_origin, log_summary
    from models import load_apr, set_origin
    from util import engine
    from util.errors import UserError, first_five
    from util.latents import infer
    from util.losses import CameraPoseLoss
    from util.report import report, report_images, scene_names_of

    config = run.config
    multi_scene = args.model_name not in SINGLE_SCENE_APRS
    freeze = config.get("freeze", False)
    if args.mode != "train" and args.checkpoint_path is None:
        raise UserError(f"{args.mode} needs --checkpoint_path, the weights of the APR")
    if args.mode == "predict" and (args.labels_file != "-" or args.predictions_path is None):
        raise UserError("predict takes images in the place of the dataset, - in that of the label file, and --predictions_path, "
                        "where the poses go")
    if args.as_stored and args.mode != "predict":
        raise UserError(f"--as_stored is for predict: {args.mode} takes frames as stored, as their labels are; leave it out")
    if freeze and not multi_scene:
        raise UserError(f"freeze is for multi-scene models, not for {args.model_name}; leave it out or set it to false")

    apr = load_apr(args.model_name, args.backbone_path, config, args.checkpoint_path).to(run.device)
    names = scene_names_of(args.model_name, config, args.checkpoint_path)

    if args.mode == "train":
        transform = test_transform() if config.get("no_augment", False) else train_transform()
        dataset = CameraPoseDataset(args.dataset_path, args.labels_file, transform, config.get("equalize_scenes", False),
                                    names, run.seed)
        if args.checkpoint_path is None:
            set_origin(apr, far_origin(dataset.truth[:, :3].numpy()))
        dataset.move_to(apr.origin)
        if apr.origin is not None:
            logging.info("Positions are taken relative to (%s), which the weights keep", ", ".join(f"{x:.3f}" for x in apr.origin.tolist()))
        if multi_scene:
            dataset.require_scenes(config["num_scenes"], order_known=names is not None or args.checkpoint_path is None)
        log_summary(args.labels_file, dataset.labels)
        dataset.cache_frames(args.cache_dir, config.get("cache_memory_gb"))
        if freeze:
            freeze_all_but(apr, config["freeze_exclude_phrase"])
            if not any(p.requires_grad for name, p in apr.named_parameters() if name.startswith("regressor_head")):
                raise UserError(f"freeze_exclude_phrase {config['freeze_exclude_phrase']!r} leaves no head to train: one "
                                "of the phrases must be in names such as regressor_head_t.fc_h.weight")
        pose_loss = CameraPoseLoss(config).to(run.device)

        def step(batch):
            if freeze:
                # As published: the transformers run in eval mode without gradient, and only heads can learn.
                apr.eval()
                with torch.no_grad():
                    latents = apr.forward_transformers(batch)
                apr.train()
                result = apr.forward_heads(latents)
            else:
                result = apr(batch)
            loss = pose_loss(result["pose"], batch["pose"])
            if multi_scene:
                loss = loss + F.nll_loss(result["scene_log_distr"], batch["scene"])
            return loss, result["pose"]

        if args.val_labels_file is not None:
            seen = CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=names or dataset.scene_names,
                                     origin=apr.origin)
            seen.cache_frames(args.cache_dir, config.get("cache_memory_gb"))
            seen_frames = engine.frames_of(run, seen)

            def validate():
                found = engine.answers(run, seen_frames, lambda batch: {"pose": infer(apr, batch["img"])["pose"]}, "validation")
                return found["pose"], seen.poses

        batches = train_batches(dataset, config["batch_size"], config["n_workers"], run.seed)
        engine.train(run, apr, pose_loss, batches, step, cli.about(run, args.model_name, dataset.scene_names),
                     validate=validate if args.val_labels_file is not None else None)
    elif args.mode == "predict":
        apr.eval()
        images = Images(args.dataset_path, args.as_stored)
        results = engine.evaluate(run, lambda batch: {**infer(apr, batch["img"]), "readable": batch["readable"]}, images)
        unreadable = [images.problem(i) for i in (~results["readable"]).nonzero().squeeze(1).tolist()]
        if len(unreadable) == len(images):
            raise UserError(first_five(unreadable))
        report_images(run, images.names, results, names, apr.origin)
        if unreadable:
            raise UserError(f"{first_five(unreadable)}; {args.predictions_path} has the poses of the other images")
    else:
        apr.eval()
        dataset = CameraPoseDataset(args.dataset_path, args.labels_file, test_transform(), scene_names=names)
        dataset.move_to(apr.origin)
        results = engine.evaluate(run, lambda batch: infer(apr, batch["img"]), dataset)
        report(run, args.checkpoint_path, dataset, results, names)


def freeze_all_but(apr, phrases):
    """Freeze the parameters whose names hold none of the phrases."""
    phrases = [phrases] if isinstance(phrases, str) else phrases
    for name, parameter in apr.named_parameters():
        parameter.requires_grad_(any(phrase in name for phrase in phrases))


if __name__ == "__main__":
    cli.run(main)
