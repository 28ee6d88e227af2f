"""Train or test an absolute pose regressor (APR), predict the poses of one's own images, or export it to ONNX."""
import logging
import sys

from engine.inputs import add_input_options, check_input_options, open_input
from engine.run import about, parser, run_main, start
from engine.short import in_full, names_onnx_file
from models import APR_NAMES, MULTI_SCENE_APRS, SINGLE_SCENE_APRS
from util.errors import UserError


def main():
    if sys.argv[1:2] == ["predict"] and names_onnx_file(sys.argv[2:]):
        from engine import onnx_predict

        return onnx_predict.predict(sys.argv[2:])
    if sys.argv[1:2] in (["predict"], ["export"]):
        sys.argv[1:] = in_full(sys.argv[1:])
    options = parser(__doc__, APR_NAMES, modes=("train", "test", "predict", "export"))
    options.add_argument("--checkpoint_path", metavar="FILE.pth",
                         help="the APR's weights: to start from in training, else required (default: none in "
                              "training)")
    options.add_argument("--encoder_checkpoint_path", metavar="PAE.pth",
                         help="except in training: the APR's PAE, to tell the novelty of frames and, in predict, to "
                              "correct their poses by what it remembers of training frames (default: none)")
    add_input_options(options)
    options.add_argument("--export_path", metavar="FILE.onnx", help="in export: the file to write")
    options.add_argument("--input", choices=("frames", "tensor"), default="frames",
                         help="in export: what the file takes, frames of any size (uint8, N x H x W x 3) or normalised "
                              "tensors, N x 3 x 224 x 224 (default: frames)")
    options.add_argument("--quantize", choices=("int8",),
                         help="in export: quantise the network, calibrated on frames of LABELS (default: fp32)")
    args = options.parse_args()
    check(args)
    run = start(args, sections=("pose_encoder",) if args.encoder_checkpoint_path else (),
                ahead=args.mode == "test")
    if run.config["freeze"] and args.model_name in SINGLE_SCENE_APRS:
        raise UserError(f"freeze is for multi-scene models, not for {args.model_name}; leave it out or set it to false")

    from engine.report import scene_names_of
    from models import load_apr

    apr = load_apr(args.model_name, args.backbone_path, run.config, args.checkpoint_path).to(run.device)
    scene_names = scene_names_of(args.model_name, run.config, args.checkpoint_path)
    {"train": train, "test": test, "predict": predict, "export": export}[args.mode](run, args, apr, scene_names)


def train(run, args, apr, scene_names):
    """Train an APR on the frames of a label file."""
    import torch
    import torch.nn.functional as F

    from datasets.loaders import train_batches
    from engine import training
    from engine.report import training_poses
    from util.losses import CameraPoseLoss

    config = run.config
    multi_scene = args.model_name not in SINGLE_SCENE_APRS
    dataset = training_dataset(run, args, apr, scene_names)
    if config["freeze"]:
        freeze_all_but(apr, config["freeze_exclude_phrase"])
    pose_loss = CameraPoseLoss(config).to(run.device)

    def step(batch):
        if config["freeze"]:
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

    batches = train_batches(dataset, config["batch_size"], config["n_workers"], run.seed)
    about_weights = {**about(run, args.model_name, dataset.scene_names), "training_poses": training_poses(dataset)}
    training.train(run, apr, pose_loss, batches, step, about_weights,
                   validate=validation(run, args, apr, scene_names or dataset.scene_names))


def training_dataset(run, args, apr, scene_names):
    """The frames to train on, decoded once. The APR gets an origin where positions are far from the labels' own."""
    from datasets.camera_poses import CameraPoseDataset
    from datasets.labels import far_origin, log_summary
    from datasets.transforms import test_transform, train_transform
    from models import set_origin

    config = run.config
    transform = test_transform() if config["no_augment"] else train_transform()
    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, transform, config["equalize_scenes"], scene_names,
                                run.seed)
    if args.checkpoint_path is None:
        set_origin(apr, far_origin(dataset.truth[:, :3].numpy()))
    dataset.move_to(apr.origin)
    if apr.origin is not None:
        origin = ", ".join(f"{x:.3f}" for x in apr.origin.tolist())
        logging.info("Positions are taken relative to (%s), which the weights keep", origin)
    if args.model_name not in SINGLE_SCENE_APRS:
        order_known = scene_names is not None or args.checkpoint_path is None
        dataset.require_scenes(config["num_scenes"], order_known)
    log_summary(args.labels_file, dataset.labels)
    dataset.cache_frames(args.cache_dir, config["cache_memory_gb"])
    return dataset


def validation(run, args, apr, scene_names):
    """A function that gives the APR's poses and the true ones of --val_labels_file; None without that option."""
    if args.val_labels_file is None:
        return None
    from datasets.camera_poses import CameraPoseDataset
    from engine import evaluation
    from models import infer

    dataset = CameraPoseDataset(args.dataset_path, args.val_labels_file, scene_names=scene_names, origin=apr.origin)
    dataset.cache_frames(args.cache_dir, run.config["cache_memory_gb"])
    batches = evaluation.test_loader(run, dataset)

    def validate():
        results = evaluation.predict(run, batches, lambda batch: {"pose": infer(apr, batch["img"])["pose"]},
                                     "validation")
        return results["pose"], dataset.poses

    return validate


def test(run, args, apr, scene_names):
    """Test an APR on the frames of a label file."""
    from datasets.camera_poses import CameraPoseDataset
    from engine.evaluation import evaluate
    from engine.novelty import novelty_of
    from engine.report import report
    from models import folded, infer

    dataset = CameraPoseDataset(args.dataset_path, args.labels_file, scene_names=scene_names)
    dataset.move_to(apr.origin)
    encoder = load_encoder(run, args, apr)
    network = folded(apr)
    results = evaluate(run, lambda batch: infer(network, batch["img"]), dataset)
    if encoder is not None:
        results = {**results, **novelty_of(run, encoder, args.encoder_checkpoint_path, results)}
    report(run, args.checkpoint_path, dataset, results, scene_names)


def predict(run, args, apr, scene_names):
    """Predict the poses of images without labels, or of a video's frames."""
    from engine.evaluation import evaluate
    from engine.novelty import corrected
    from engine.report import convention_of, read_training_poses, report_images
    from engine.watch import watch
    from models import folded, infer
    from models.checkpoints import read_about
    from util.errors import first_five

    images = None if args.watch else open_input(args.dataset_path, args.as_stored, args.every)
    encoder = load_encoder(run, args, apr)
    network = folded(apr)
    if args.watch:
        watch(run, network, encoder, args.encoder_checkpoint_path, scene_names, args.dataset_path, args.as_stored)
        return
    results = evaluate(run, lambda batch: {**infer(network, batch["img"]), "readable": batch["readable"]}, images)
    unreadable = images.problems(results["readable"])
    if not results["readable"].any():
        raise UserError(first_five(unreadable))
    if encoder is not None:
        results = corrected(run, encoder, args.encoder_checkpoint_path, results)
    about_weights = read_about(args.checkpoint_path)
    trained_on = read_training_poses(about_weights, encoder, apr.origin)
    report_images(run, images, results, scene_names, apr.origin, trained_on, convention_of(about_weights, scene_names))
    if unreadable:
        raise UserError(f"{first_five(unreadable)}; {args.predictions_path} has the poses of {images.others}")


def export(run, args, apr, scene_names):
    """Write an APR, and the novelty that its PAE tells, as an ONNX file."""
    from engine.onnx_export import Estimator, describe_weights, export_network, with_preprocessing, write_model
    from engine.run import unit_of
    from models import freeze

    apr = apr.cpu()
    freeze(apr)
    encoder = load_encoder(run, args, apr)
    if encoder is not None and not len(encoder.memory):
        logging.info("No novelty: %s remembers no training frames", args.encoder_checkpoint_path)
    logging.info("Converting the network, which takes up to a minute")
    model = export_network(Estimator(apr, encoder))
    if args.quantize:
        from engine.onnx_quantize import quantised

        model = quantised(run, model, args.dataset_path, scene_names)
    if args.input == "frames":
        model = with_preprocessing(model)
    write_model(args.export_path, model, describe_weights(args, scene_names, unit_of(args)))


def load_encoder(run, args, apr):
    """The PAE of --encoder_checkpoint_path, or None without that option."""
    if args.encoder_checkpoint_path is None:
        return None
    from engine.novelty import check_max_novelty
    from models import load_pose_encoder

    path = args.encoder_checkpoint_path
    encoder = load_pose_encoder(args.model_name, run.config, path, apr, args.checkpoint_path)
    check_max_novelty(run, encoder, path)
    return encoder


def check(args):
    """Raise UserError for arguments that do not fit together, before anything slow is loaded."""
    if args.mode != "train" and args.checkpoint_path is None:
        raise UserError(f"{args.mode} needs --checkpoint_path, the weights of the APR")
    if args.mode == "predict" and args.checkpoint_path.endswith(".onnx"):
        raise UserError(f"{args.checkpoint_path}: an ONNX file takes the short form, python main.py predict PHOTOS "
                        "--checkpoint_path FILE.onnx")
    if args.mode == "predict" and (args.labels_file != "-" or args.predictions_path is None):
        raise UserError("predict takes images in the place of the dataset, - in that of the label file, and "
                        "--predictions_path, where the poses go")
    check_input_options(args)
    if args.mode == "export":
        from engine.onnx_file import check_export

        check_export(args)
    elif args.export_path is not None or args.quantize is not None or args.input != "frames":
        raise UserError(f"--export_path, --input and --quantize are for export, not for {args.mode}; leave them out")
    if args.encoder_checkpoint_path is not None and args.mode == "train":
        raise UserError("--encoder_checkpoint_path is for test, predict and export; leave it out in training")
    if args.encoder_checkpoint_path is not None and args.model_name not in (*SINGLE_SCENE_APRS, *MULTI_SCENE_APRS):
        raise UserError(f"{args.model_name} returns no latents, so it can have no PAE: leave --encoder_checkpoint_path "
                        "out")
    if args.max_novelty is not None and args.encoder_checkpoint_path is None:
        raise UserError("--max_novelty needs --encoder_checkpoint_path, the APR's PAE, which tells novelty")


def freeze_all_but(apr, phrases):
    """Freeze the parameters whose names hold none of the phrases. Raises UserError where no head is left to train."""
    excluded = [phrases] if isinstance(phrases, str) else phrases
    for name, parameter in apr.named_parameters():
        parameter.requires_grad_(any(phrase in name for phrase in excluded))
    if not any(p.requires_grad for name, p in apr.named_parameters() if name.startswith("regressor_head")):
        raise UserError(f"freeze_exclude_phrase {phrases!r} leaves no head to train: one of the phrases must be in "
                        "names such as regressor_head_t.fc_h.weight")


if __name__ == "__main__":
    run_main(main)
