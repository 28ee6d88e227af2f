"""Refine an APR's poses: by a PAE and reference poses at test time (optimize), or by a network that is trained and tested."""
import logging

from models import MULTI_SCENE_APRS, SINGLE_SCENE_APRS
from util import cli

SOLVERS = ("linear", "inversion", "mlp", "simplex")
NEED_NOISE = ("linear", "inversion")  # what PAEs trained here hold: the covariance of latents


def main():
    parser = cli.parser(__doc__, (*SINGLE_SCENE_APRS, *MULTI_SCENE_APRS), modes=("train", "test", "optimize"))
    parser.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT", help="the weights of the APR")
    parser.add_argument("encoder_checkpoint_path", metavar="ENCODER_CHECKPOINT",
                        help="the weights of the APR's PAE; only optimize reads them")
    parser.add_argument("--rpr_checkpoint_path", metavar="FILE.pth",
                        help="the refiner's weights to start from in training, to test in testing (default: none in training)")
    parser.add_argument("--ref_poses_file", metavar="TRAIN.csv",
                        help="the training labels, whose poses optimize takes as references (default: none; required there)")
    parser.add_argument("--solver", choices=SOLVERS,
                        help="how optimize refines: linear, the best linear estimate from the latents, given the references and their "
                             "encodings; inversion, the pose whose encoding is nearest to the latents; mlp, the paper's; simplex, "
                             "the minimum of the paper's objective (default: linear, or with a published PAE mlp)")
    parser.add_argument("--allow_query_poses", action="store_true",
                        help="let the references hold poses under test, as published: the result is no measurement")
    args = parser.parse_args()
    run = cli.start(args, "_rpr", ("pose_encoder", "refiner"))

    import torch

    from datasets.camera_poses import CameraPoseDataset
    from datasets.labels import log_summary
    from models import build_pose_encoder, load_apr
    from models.checkpoints import check_fingerprint, fill, fingerprint, read_checkpoint
    from models.pose_refiner import PoseRefiner
    from util import engine
    from util.errors import UserError
    from util.latents import compute_latents, freeze, infer, latent_batches, latent_transform, n_views, one_thread, queries_of
    from util.losses import CameraPoseLoss
    from util.references import read_references
    from util.refinement import LEAST_REFERENCES, optimize
    from util.report import report, scene_names_of

    config = run.config
    multi_scene = args.model_name not in SINGLE_SCENE_APRS
    if args.mode == "test" and args.rpr_checkpoint_path is None:
        raise UserError("a test needs --rpr_checkpoint_path, the weights to test")
    if args.mode == "optimize" and args.ref_poses_file is None:
        raise UserError("optimize needs --ref_poses_file, the label file that the APR was trained on")

    apr = load_apr(args.model_name, args.backbone_path, config, args.apr_checkpoint_path).to(run.device)
    freeze(apr)
    names = scene_names_of(args.model_name, config, args.apr_checkpoint_path)
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, latent_transform(run), scene_names=names, seed=run.seed,
                                origin=apr.origin)
    if args.mode != "optimize":
        refiner = PoseRefiner(config["hidden_dim"]).to(run.device)
        if args.rpr_checkpoint_path is not None:
            fill(args.rpr_checkpoint_path, refiner, read_checkpoint(args.rpr_checkpoint_path, "refiner", config))

    if args.mode == "train":
        log_summary(args.labels_file, dataset.labels)
        latents = compute_latents(run, apr, dataset, n_views(config))
        refiner.apr.copy_(fingerprint(apr))
        latents = {**queries_of(latents), "estimate": latents["estimate"], "row": latents["row"]}  # 'pose' is the truth here
        if args.rpr_checkpoint_path is None:
            refiner.fit_inputs(latents["latents"], latents["estimate"], latents["pose"])
        pose_loss = CameraPoseLoss(config).to(run.device)

        def step(batch):
            pose = refiner(batch["latents"], batch["estimate"])
            return pose_loss(pose, batch["pose"]), pose

        if args.val_labels_file is not None:
            seen = compute_latents(run, apr, CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=names,
                                                               origin=apr.origin))

            def validate():
                return refiner(queries_of(seen)["latents"], seen["estimate"]), seen["pose"]

        batches = latent_batches(latents, config["batch_size"], run.seed, n_views(config))
        with one_thread():
            engine.train(run, refiner, pose_loss, batches, step, cli.about(run, "refiner of " + args.model_name, names),
                         validate=validate if args.val_labels_file is not None else None)
        return

    if args.mode == "test":
        check_fingerprint(args.rpr_checkpoint_path, refiner.apr, apr, args.apr_checkpoint_path)
        tested, leaked = args.rpr_checkpoint_path, False
        refiner.eval()

        def refine(queries):
            return refiner(queries["latents"], queries["pose"]), torch.ones(len(queries["pose"]), dtype=torch.bool)
    else:
        encoder = build_pose_encoder(args.model_name, config, args.encoder_checkpoint_path).to(run.device)
        check_fingerprint(args.encoder_checkpoint_path, encoder.apr, apr, args.apr_checkpoint_path)
        freeze(encoder)
        if not encoder.takes_unit_quaternions:
            logging.warning("%s is a published PAE, trained on raw estimates: it has never seen unit quaternions such as the "
                            "references'; a PAE trained with main_learn_*pose_encoding.py has", args.encoder_checkpoint_path)
        solver = args.solver or ("linear" if encoder.noise.any() else "mlp")
        if solver in NEED_NOISE and not encoder.noise.any():
            raise UserError(f"{args.encoder_checkpoint_path}: does not hold the covariance of latents that {solver} works with, as a PAE trained "
                            "with main_learn_*pose_encoding.py does; choose --solver mlp or simplex")
        tested = f"{args.apr_checkpoint_path} refined by {args.encoder_checkpoint_path} ({solver})"
        references, scenes, leaked = read_references(
            args.ref_poses_file, dataset, names, config["num_scenes"] if multi_scene else None, args.allow_query_poses)
        references, scenes = references.to(run.device), scenes.to(run.device)

        def refine(queries):
            return optimize(solver, encoder, queries, references, scenes, config, run.seed)

    results = engine.evaluate(run, lambda batch: infer(apr, batch["img"]), dataset)
    queries = {key: value.to(run.device) for key, value in queries_of(results).items()}
    with torch.no_grad(), one_thread():
        refine({key: value[:1] for key, value in queries.items()})  # warm up
        taken, (poses, refined) = engine.milliseconds(lambda: refine(queries), run.device)
    milliseconds = taken / len(poses)
    logging.info("Refinement: {:.3f} ms a query, {:.1f}% of the APR's time".format(
        milliseconds, 100 * milliseconds / results["milliseconds"].mean()))
    if not refined.all():
        logging.info("%d frames keep the APR's pose: too few reference poses in their scene (linear and inversion need %d)",
                     (~refined).sum(), LEAST_REFERENCES)
    results = {**results, "pose": poses.cpu(), "apr_pose": results["pose"],
               "milliseconds": results["milliseconds"] + milliseconds,
               "milliseconds_alone": results["milliseconds_alone"] + milliseconds}
    report(run, tested, dataset, results, names, leaked)


if __name__ == "__main__":
    cli.run(main)
