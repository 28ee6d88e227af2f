"""Refine an APR's poses: by a PAE and reference poses at test time (optimize), or by a network (train, test)."""
import logging
import os

from engine.run import about, parser, run_main, start
from models import MULTI_SCENE_APRS, SINGLE_SCENE_APRS, SOLVERS, SOLVERS_WITH_NOISE
from util.errors import UserError


def main():
    options = parser(__doc__, (*SINGLE_SCENE_APRS, *MULTI_SCENE_APRS), modes=("train", "test", "optimize"))
    options.add_argument("apr_checkpoint_path", metavar="APR_CHECKPOINT", help="the weights of the APR")
    options.add_argument("encoder_checkpoint_path", metavar="ENCODER_CHECKPOINT",
                         help="the weights of the APR's PAE; training does not read them, and test does only for "
                              "novelty")
    options.add_argument("--rpr_checkpoint_path", metavar="FILE.pth",
                         help="the refiner's weights to start from in training, to test in testing (default: none "
                              "in training)")
    options.add_argument("--ref_poses_file", metavar="TRAIN.csv",
                         help="the training labels, whose poses optimize takes as references (default: none; "
                              "kernel needs none)")
    options.add_argument("--solver", choices=SOLVERS,
                         help="how optimize refines: kernel, the APR's errors on the training frames that the PAE "
                              "remembers, carried over; linear, the linear minimum mean square error estimate from "
                              "the latents, given the references and their encodings; inversion, the pose whose "
                              "encoding is nearest to the latents; mlp, the paper's; simplex, the minimum of the "
                              "paper's objective (default: kernel, or linear with an earlier PAE, or mlp with a "
                              "published one)")
    options.add_argument("--fit_noise", action="store_true",
                         help="in optimize: complete a PAE that holds no noise and no memory, such as a published one, "
                              "by one pass of the APR over the frames of --ref_poses_file, and write it beside the log "
                              "(default: off)")
    options.add_argument("--method", choices=("refiner", "iapr"),
                         help="what train trains: the learned refiner, or iAPR, which refines iteratively (default: "
                              "refiner)")
    options.add_argument("--allow_query_poses", action="store_true",
                         help="let the references hold poses under test, as published: the result is no measurement")
    args = options.parse_args()
    if args.mode == "test" and args.rpr_checkpoint_path is None:
        raise UserError("a test needs --rpr_checkpoint_path, the weights to test")
    if args.fit_noise and (args.mode != "optimize" or args.ref_poses_file is None):
        raise UserError("--fit_noise is for optimize, with --ref_poses_file, the label file that the APR was trained "
                        "on")
    if args.method is not None and args.mode != "train":
        raise UserError("--method is for train; a test knows iAPR by its weights, and optimize has --solver")
    if args.method == "iapr" and args.model_name not in MULTI_SCENE_APRS:
        raise UserError(f"iAPR refines poses of {' or '.join(MULTI_SCENE_APRS)}, not of {args.model_name}")
    run = start(args, "_rpr", () if args.method == "iapr" else ("pose_encoder", "refiner"),
                ahead=args.method != "iapr")

    from engine.report import scene_names_of
    from models import freeze, load_apr

    apr = load_apr(args.model_name, args.backbone_path, run.config, args.apr_checkpoint_path).to(run.device)
    freeze(apr)
    scene_names = scene_names_of(args.model_name, run.config, args.apr_checkpoint_path)
    mode = "iapr" if args.method == "iapr" else args.mode
    {"train": train, "iapr": train_iapr, "test": test, "optimize": optimize}[mode](run, args, apr, scene_names)


def train(run, args, apr, scene_names):
    """Train the learned refiner on the latents of the frozen APR, which runs over the frames once."""
    from datasets.labels import log_summary
    from engine import training
    from engine.evaluation import compute_latents, latent_batches, threads
    from models.checkpoints import fingerprint
    from models.refinement import queries_of
    from util.losses import CameraPoseLoss

    def latents_of(dataset):
        latents = compute_latents(run, apr, dataset)
        # 'pose' is the true one here.
        return {**queries_of(latents), "estimate": latents["estimate"], "row": latents["row"]}

    refiner = load_refiner(run, args)
    dataset = load_dataset(args, args.labels_file, apr, scene_names)
    log_summary(args.labels_file, dataset.labels)
    latents = latents_of(dataset)
    refiner.apr.copy_(fingerprint(apr))
    if args.rpr_checkpoint_path is None:
        refiner.fit_inputs(latents["latents"], latents["estimate"], latents["pose"])
    pose_loss = CameraPoseLoss(run.config).to(run.device)

    def step(batch):
        pose = refiner(batch["latents"], batch["estimate"])
        return pose_loss(pose, batch["pose"]), pose

    validate = None
    if args.val_labels_file is not None:
        validation = latents_of(load_dataset(args, args.val_labels_file, apr, scene_names))

        def validate():
            return refiner(validation["latents"], validation["estimate"]), validation["pose"]

    with threads(1):
        training.train(run, refiner, pose_loss, latent_batches(latents, run.config["batch_size"], run.seed), step,
                       about(run, "refiner of " + args.model_name, scene_names), validate=validate)


def train_iapr(run, args, apr, scene_names):
    """Train iAPR, whole: relative poses from augmented images to the encoded poses of other training frames.

    Its MS-Transformer begins as the APR, and its PAE as ENCODER_CHECKPOINT where that is a published one.
    """
    from datasets.labels import log_summary
    from datasets.loaders import train_batches
    from datasets.pose_pairs import PosePairs
    from datasets.transforms import test_transform, train_transform
    from engine import training
    from engine.evaluation import predict, test_loader
    from models import infer
    from models.checkpoints import fill, read_checkpoint
    from models.iapr import IAPR, moved_back, relative_pose
    from util.losses import CameraPoseLoss

    config = run.config
    iapr = IAPR(config).to(run.device)
    if args.rpr_checkpoint_path is not None:
        fill(args.rpr_checkpoint_path, iapr, read_checkpoint(args.rpr_checkpoint_path, "iAPR", config))
    else:
        iapr.mstransformer.load_state_dict(apr.state_dict())
        begin_encoder(iapr.pae, args.encoder_checkpoint_path)
    dataset = PosePairs(args.dataset_path, args.labels_file,
                        test_transform() if config["no_augment"] else train_transform(), config["equalize_scenes"],
                        scene_names, run.seed, apr.origin)
    dataset.require_scenes(config["num_scenes"], order_known=scene_names is not None)
    log_summary(args.labels_file, dataset.labels)
    dataset.cache_frames(args.cache_dir, config["cache_memory_gb"])
    pose_loss = CameraPoseLoss(config).to(run.device)

    def step(batch):
        relative = iapr(batch["img"], batch["scene"], batch["other"])
        loss = pose_loss(relative, relative_pose(batch["pose"], batch["other"]))
        return loss, moved_back(batch["other"], relative)

    validate = None
    if args.val_labels_file is not None:
        val_dataset = load_dataset(args, args.val_labels_file, apr, scene_names)

        def refined(batch):
            first = infer(apr, batch["img"])
            return {"pose": iapr.refine(batch["img"], first["scene"], first["pose"], config["num_iterations"])}

        def validate():
            return predict(run, test_loader(run, val_dataset), refined, "validation")["pose"], val_dataset.poses

    batches = train_batches(dataset, config["batch_size"], config["n_workers"], run.seed)
    training.train(run, iapr, pose_loss, batches, step, about(run, "iAPR of " + args.model_name, dataset.scene_names),
                   validate=validate)


def begin_encoder(pae, path):
    """Give iAPR's PAE the weights of a published one. Ours are trained on other poses, and leave it as it is."""
    from models.checkpoints import describe, fill, read_weights

    weights = read_weights(path) if os.path.exists(path) else {}
    if describe(weights).get("kind") == "multi-scene PAE" and "scale" not in weights:
        fill(path, pae, weights)
    else:
        logging.info("iAPR's PAE begins with random weights: %s is no published one", path)


def test(run, args, apr, scene_names):
    """Test the learned refiner, or iAPR."""
    import torch

    from models import load_pose_encoder
    from models.checkpoints import check_fingerprint, describe, read_weights

    is_iapr = describe(read_weights(args.rpr_checkpoint_path)).get("kind") == "iAPR"
    if not is_iapr:
        refiner = load_refiner(run, args)
        check_fingerprint(args.rpr_checkpoint_path, refiner.apr, apr, args.apr_checkpoint_path)
        refiner.eval()
    path, encoder = args.encoder_checkpoint_path, None
    if os.path.exists(path):
        encoder = load_pose_encoder(args.model_name, run.config, path, apr, args.apr_checkpoint_path)
    else:
        logging.info("No novelty: there is no PAE %s", path)
    dataset = load_dataset(args, args.labels_file, apr, scene_names)
    if is_iapr:
        test_iapr(run, args, apr, dataset, scene_names, encoder)
        return

    def refine(queries):
        return refiner(queries["latents"], queries["pose"]), torch.ones(len(queries["pose"]), dtype=torch.bool)

    test_refinement(run, args, apr, dataset, scene_names, args.rpr_checkpoint_path, refine, encoder)


def test_iapr(run, args, apr, dataset, scene_names, encoder):
    """Test iAPR, whose checkpoint brings its own MS-Transformer and PAE. The APR gives the first pose and the scene."""
    from engine.evaluation import evaluate
    from engine.novelty import check_max_novelty, novelty_of
    from engine.report import report
    from models import folded, freeze, infer
    from models.checkpoints import fill, read_checkpoint
    from models.iapr import IAPR

    if args.model_name not in MULTI_SCENE_APRS:
        raise UserError(f"{args.rpr_checkpoint_path}: iAPR refines poses of {' or '.join(MULTI_SCENE_APRS)}, not of "
                        f"{args.model_name}")
    path = args.encoder_checkpoint_path
    check_max_novelty(run, encoder, path)
    iapr = IAPR(run.config).to(run.device)
    fill(args.rpr_checkpoint_path, iapr, read_checkpoint(args.rpr_checkpoint_path, "iAPR", run.config))
    freeze(iapr)
    network = folded(apr)

    def estimate(batch):
        result = infer(network, batch["img"])
        return {**result, "apr_pose": result["pose"],
                "pose": iapr.refine(batch["img"], result["scene"], result["pose"], run.config["num_iterations"])}

    results = evaluate(run, estimate, dataset)
    if encoder is not None:
        results.update(novelty_of(run, encoder, path, {**results, "pose": results["apr_pose"]}, None))
    report(run, args.rpr_checkpoint_path, dataset, results, scene_names)


def optimize(run, args, apr, scene_names):
    """Refine the APR's poses at test time, by a solver, a PAE and reference poses."""
    from datasets.references import check_remembered, read_references
    from models import load_pose_encoder, refinement

    dataset = load_dataset(args, args.labels_file, apr, scene_names)
    path = args.encoder_checkpoint_path
    encoder = load_pose_encoder(args.model_name, run.config, path, apr, args.apr_checkpoint_path)
    if not encoder.takes_unit_quaternions:
        logging.warning("%s is a published PAE, trained on raw estimates: it has never seen unit quaternions such as "
                        "the references'; a PAE trained with main_learn_*pose_encoding.py has", path)
    references, scenes, leaked = None, None, False
    if args.ref_poses_file is not None:
        num_scenes = run.config["num_scenes"] if args.model_name in MULTI_SCENE_APRS else None
        references, scenes, leaked = read_references(args.ref_poses_file, dataset, scene_names, num_scenes,
                                                     args.allow_query_poses)
        references, scenes = references.to(run.device), scenes.to(run.device)
    if args.fit_noise:
        fit_noise(run, args, apr, encoder, scene_names)
    leaked |= check_remembered(path, encoder.memory.poses, dataset, args.allow_query_poses)
    solver = choose_solver(args, encoder)

    def refine(queries):
        return refinement.optimize(solver, encoder, queries, references, scenes, run.config, run.seed)

    tested = f"{args.apr_checkpoint_path} refined by {path} ({solver})"
    test_refinement(run, args, apr, dataset, scene_names, tested, refine, encoder, leaked, solver == "kernel" or None)


def choose_solver(args, encoder):
    """The solver that --solver names, or the default. Raises UserError for one that lacks what it works with."""
    has_noise, has_memory = bool(encoder.noise.any()), len(encoder.memory) > 0
    solver = args.solver or ("kernel" if has_memory else "linear" if has_noise else "mlp")
    if (solver == "kernel" and not has_memory) or (solver in SOLVERS_WITH_NOISE and not has_noise):
        kept = "memory of training frames" if solver == "kernel" else "covariance of latents"
        raise UserError(f"{args.encoder_checkpoint_path}: does not hold the {kept} that {solver} works with, as a PAE "
                        "trained with main_learn_*pose_encoding.py does; choose --solver mlp or simplex, or give "
                        "--fit_noise")
    if solver != "kernel" and args.ref_poses_file is None:
        from engine.novelty import forgotten

        needs = f"{solver} needs --ref_poses_file, the label file that the APR was trained on"
        raise UserError(needs if args.solver else f"{needs}; kernel, which needs none, is not at hand: "
                        f"{forgotten(args.encoder_checkpoint_path)}")
    return solver


def fit_noise(run, args, apr, encoder, scene_names):
    """Complete a PAE on the frames of --ref_poses_file, over which the APR runs once, and write it."""
    from engine.evaluation import compute_latents, frames_of
    from engine.novelty import warn_of_few_frames
    from models.checkpoints import fingerprint, save_weights

    latents = compute_latents(run, apr, load_dataset(args, args.ref_poses_file, apr, scene_names))
    frames = frames_of(latents)
    warn_of_few_frames(frames["scene"], scene_names)
    encoder.fit_latents(frames)
    encoder.apr.copy_(fingerprint(apr))
    completed = f"{run.prefix}_pose_encoder.pth"
    save_weights(completed, encoder.state_dict(), about(run, "pose encoder of " + args.model_name, scene_names))
    logging.info("Noise: of %d frames of %s; memory: %d of them; the completed PAE: %s", len(latents["pose"]),
                 args.ref_poses_file, len(encoder.memory), completed)


def test_refinement(run, args, apr, dataset, scene_names, tested, refine, encoder, leaked=False, corrected=None):
    """Run the APR over the test frames, refine its poses, and report both.

    refine: queries, as models.refinement.queries_of gives them -> (poses N x 7, which of the N are refined).
    tested, leaked: as engine.report.report takes them. encoder: the PAE, or None: no novelty then. corrected: as
    engine.novelty.novelty_of takes it.
    """
    import torch

    from engine.evaluation import evaluate, milliseconds, threads
    from engine.novelty import check_max_novelty, novelty_of
    from engine.report import report
    from models import folded, infer
    from models.refinement import MIN_REFERENCES, queries_of

    path = args.encoder_checkpoint_path
    check_max_novelty(run, encoder, path)
    network = folded(apr)
    results = evaluate(run, lambda batch: infer(network, batch["img"]), dataset)
    queries = {key: value.to(run.device) for key, value in queries_of(results).items()}
    with torch.no_grad(), threads(1):
        refine({key: value[:1] for key, value in queries.items()})  # warm up
        elapsed_ms, (poses, refined) = milliseconds(lambda: refine(queries), run.device)
    ms_per_query = elapsed_ms / len(poses)
    logging.info("Refinement: {:.3f} ms a query, {:.1f}% of the APR's time".format(
        ms_per_query, 100 * ms_per_query / results["milliseconds"].mean()))
    if not refined.all():
        logging.info("%d frames keep the APR's pose: too few reference poses in their scene (%s need %d) or, for "
                     "kernel, as few of its frames in the PAE's training", (~refined).sum(),
                     " and ".join(SOLVERS_WITH_NOISE), MIN_REFERENCES)
    novelty = {} if encoder is None else novelty_of(run, encoder, path, results, corrected)
    results = {**results, "pose": poses.cpu(), "apr_pose": results["pose"],
               "milliseconds": results["milliseconds"] + ms_per_query,
               "milliseconds_alone": results["milliseconds_alone"] + ms_per_query, **novelty}
    report(run, tested, dataset, results, scene_names, leaked)


def load_dataset(args, labels_file, apr, scene_names):
    """The frames of a label file, as tests take them."""
    from datasets.camera_poses import CameraPoseDataset

    return CameraPoseDataset(args.dataset_path, labels_file, scene_names=scene_names, origin=apr.origin)


def load_refiner(run, args):
    """The learned refiner, filled from --rpr_checkpoint_path where it is given."""
    from models.checkpoints import fill, read_checkpoint
    from models.pose_refiner import PoseRefiner

    refiner = PoseRefiner(run.config["hidden_dim"]).to(run.device)
    if args.rpr_checkpoint_path is not None:
        fill(args.rpr_checkpoint_path, refiner, read_checkpoint(args.rpr_checkpoint_path, "refiner", run.config))
    return refiner


if __name__ == "__main__":
    run_main(main)
