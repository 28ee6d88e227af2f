"""Train or test a refiner, which corrects an APR's poses with a PAE: from the nearest reference pose to the query."""
import logging

from models import MULTI_SCENE_APRS, SINGLE_SCENE_APRS
from util import cli

N_NEAREST = 5  # training draws the reference among so many nearest to the query


def main():
    parser = cli.parser(__doc__, (*SINGLE_SCENE_APRS, *MULTI_SCENE_APRS))
    parser.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT", help="the weights of the APR")
    parser.add_argument("encoder_checkpoint_path", metavar="ENCODER_CHECKPOINT", help="the weights of the APR's PAE")
    parser.add_argument("--rpr_checkpoint_path", metavar="FILE.pth",
                        help="the refiner's weights to start from in training, to test in testing (default: none in training)")
    parser.add_argument("--ref_poses_file", metavar="TRAIN.csv",
                        help="the training labels that reference poses come from in testing (default: none; required there)")
    args = parser.parse_args()
    run = cli.start(args, "_rpr", ("pose_encoder", "refiner"))

    import torch

    from datasets.camera_poses import CameraPoseDataset, epoch_generator
    from datasets.labels import log_summary
    from models import build_pose_encoder, load_apr
    from models.checkpoints import fill, read_checkpoint
    from models.pose_refiner import PoseRefiner
    from util import engine
    from util.errors import UserError
    from util.latents import compute_latents, freeze, infer, latent_batches, latent_transform, n_views, one_thread
    from util.losses import CameraPoseLoss
    from util.references import nearest_references, read_references
    from util.report import report, scene_names_of

    config = run.config
    multi_scene = args.model_name not in SINGLE_SCENE_APRS
    if args.mode == "test" and args.rpr_checkpoint_path is None:
        raise UserError("a test needs --rpr_checkpoint_path, the weights to test")
    if args.mode == "test" and args.ref_poses_file is None:
        raise UserError("a test needs --ref_poses_file, the label file that the APR was trained on")

    apr = load_apr(args.model_name, args.backbone_path, config, args.apr_checkpoint_path).to(run.device)
    encoder = build_pose_encoder(args.model_name, config, args.encoder_checkpoint_path).to(run.device)
    if not encoder.takes_unit_quaternions:
        logging.info("%s is a published PAE, trained on raw estimates: it has never seen unit quaternions such as the "
                     "references'; a PAE trained with main_learn_*pose_encoding.py has", args.encoder_checkpoint_path)
    refiner = PoseRefiner(config["hidden_dim"]).to(run.device)
    if args.rpr_checkpoint_path is not None:
        fill(args.rpr_checkpoint_path, refiner, read_checkpoint(args.rpr_checkpoint_path, "refiner", config))
    freeze(apr, encoder)
    names = scene_names_of(args.model_name, config, args.apr_checkpoint_path)
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, latent_transform(run), scene_names=names, seed=run.seed)

    if args.mode == "train":
        log_summary(args.labels_file, dataset.labels)
        if multi_scene:
            dataset.require_scenes(config["num_scenes"], order_known=names is not None)
        latents = compute_latents(run, apr, dataset)
        poses, scenes = dataset.poses.to(run.device), torch.tensor(dataset.scenes if multi_scene else 0 * dataset.scenes).to(run.device)
        reference_latents = torch.cat(encoder(poses, scenes), dim=1)
        nearest = nearest_references(poses, scenes, poses, scenes, k=N_NEAREST, exclude_self=True)
        if (nearest < 0).any():
            raise UserError(f"{args.labels_file}: a scene with a single frame has no references to train on")
        pose_loss = CameraPoseLoss(config).to(run.device)
        latent_rows = latent_batches(latents, config["batch_size"], run.seed, n_views(config))

        def batches(epoch):
            # One of the nearest training poses, drawn anew every epoch.
            drawn = torch.randint(N_NEAREST, (len(nearest), 1), generator=epoch_generator(run.seed, epoch)).to(run.device)
            latents["reference"] = nearest.gather(1, drawn).squeeze(1).repeat(n_views(config))
            return latent_rows(epoch)

        def step(batch):
            query_latents = torch.cat((batch["latent_x"], batch["latent_q"]), dim=1)
            pose = refiner(query_latents, reference_latents[batch["reference"]], poses[batch["reference"]])
            return pose_loss(pose, batch["pose"]), pose

        with one_thread():
            engine.train(run, refiner, pose_loss, batches, step, cli.about(run, "refiner of " + args.model_name, names))
    else:
        refiner.eval()
        references, scenes = (t.to(run.device) for t in read_references(
            args.ref_poses_file, dataset, names, config["num_scenes"] if multi_scene else None))
        with torch.no_grad():
            reference_latents = torch.cat(encoder(references, scenes), dim=1)

        def estimate(batch):
            result = infer(apr, batch["img"])
            scene = result.get("scene", scenes.new_zeros(len(result["pose"])))
            reference = nearest_references(result["pose"], scene, references, scenes, k=1).squeeze(1)
            query_latents = torch.cat((result["latent_x"], result["latent_q"]), dim=1)
            pose = refiner(query_latents, reference_latents[reference], references[reference])
            # Without a reference in the predicted scene the APR's pose stays.
            pose = torch.where(reference.unsqueeze(1) < 0, result["pose"], pose)
            return {**result, "pose": pose, "apr_pose": result["pose"], "reference": reference}

        results = engine.evaluate(run, estimate, dataset)
        if (results["reference"] < 0).any():
            logging.info("%d frames keep the APR's pose: no reference pose in their predicted scene",
                         (results["reference"] < 0).sum())
        report(run, args.rpr_checkpoint_path, dataset, results, names)


if __name__ == "__main__":
    cli.run(main)
