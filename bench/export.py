"""How fast exported networks are on a CPU, beside PyTorch, how large their files are, and what int8 costs.

The networks take normalised tensors. Their variants take turns. PoseNet on MobileNetV2 has the weights of
../shared/data/published where that exists, and then errors on the test frames beside it; other weights are random.
"""
import time
from pathlib import Path

import numpy as np
import torch

from bench import common
from bench.variants import CONFIG, MODELS
from datasets.camera_poses import CameraPoseDataset
from datasets.transforms import SIZE, to_input
from engine import evaluation
from engine.onnx_export import Estimator, export_network
from engine.onnx_file import estimate, session_of
from engine.onnx_quantize import quantise
from models import folded, freeze, infer, load_apr
from models.cpu import keep_freed_memory
from util import cli
from util.metrics import pose_err
from util.progress import progress

SHARED = Path("../shared/data")
NAMES = ("posenet-mobilenet", "posenet-efficientnet", "ems-transposenet")
BATCH = 8


class Eager:
    """A network in PyTorch, as tests run it. Call it with images: N x 3 x H x W (array) -> N x 7 (array)."""

    def __init__(self, apr, precision):
        self.apr, self.precision = folded(apr), precision
        self.megabytes = sum(tensor.nbytes for tensor in apr.state_dict().values()) / 1e6

    @torch.inference_mode()
    def __call__(self, images, threads):
        """Poses of N images."""
        self.apr.precision = self.precision
        images = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        with evaluation.threads(threads):
            return infer(self.apr, images)["pose"].numpy()


class Exported:
    """A network in ONNX Runtime, called as `Eager`."""

    def __init__(self, model):
        content = model.SerializeToString()
        self.megabytes = len(content) / 1e6
        self.sessions = {threads: session_of(content, threads) for threads in (1, 2)}

    def __call__(self, images, threads):
        """Poses of N images."""
        outputs = estimate(self.sessions[threads], images)
        return np.concatenate((outputs["position"], outputs["quaternion"]), axis=1)


def variants_of(name, weights, dataset):
    """The variants of a model: {name: `Eager` or `Exported`}. dataset: of frames that calibrate int8."""
    torch.manual_seed(0)
    model, config, _ = MODELS[name]
    apr = load_apr(model, "none", {**CONFIG, **config}, weights)
    freeze(apr)
    network = export_network(Estimator(apr))
    return {"eager fp32": Eager(apr, "fp32"), "eager bf16": Eager(apr, "bf16"), "ONNX Runtime fp32": Exported(network),
            "ONNX Runtime int8": Exported(quantise(network, dataset))}


def measure(variants, rounds):
    """Milliseconds of one frame with one and two threads, and frames/s in batches with two: {variant: 3 medians}."""
    images = np.random.default_rng(0).standard_normal((BATCH, 3, SIZE, SIZE)).astype(np.float32)
    cases = ((images[:1], 1), (images[:1], 2), (images, 2))
    elapsed = {name: [[] for _ in cases] for name in variants}
    for i in progress(range(rounds + 2), desc="rounds"):
        for name, variant in variants.items():
            for times, case in zip(elapsed[name], cases):
                variant(*case)  # after another variant's turn
                start = time.perf_counter()
                variant(*case)
                times += [time.perf_counter() - start] if i > 1 else []
    return {name: (*(1000 * np.median(times) for times in single), BATCH / np.median(batch))
            for name, (*single, batch) in elapsed.items()}


def medians(variant, dataset):
    """The median errors of a variant on a dataset, as text."""
    frames = [dataset[i]["img"] for i in range(len(dataset))]
    images = [to_input(frame.unsqueeze(0)).contiguous().numpy() for frame in frames]
    poses = np.concatenate([variant(image, 2) for image in images])
    errors = pose_err(torch.from_numpy(poses).float(), dataset.truth)
    return "{:.3f} m, {:.2f} deg".format(*(error.median().item() for error in errors))


def published():
    """The published weights, and the datasets of their training and test frames; three times None without them."""
    weights, frames = SHARED / "published/posenet_mobilenet_apr.pth", SHARED / "7scenes_mini"
    if not (weights.exists() and frames.exists()):
        return None, None, None
    datasets = []
    for split in ("train", "test"):
        labels = Path(f"out/bench/mini_{split}.csv")
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text((frames / f"expected_{split}.csv").read_text().replace(".png", ".jpg"))
        datasets.append(CameraPoseDataset(frames, labels))
    return weights, *datasets


def main():
    """Run the benchmark that the command line asks for."""
    parser = common.parser("export", __doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each variant (default: 30)")
    parser.add_argument("--frames", type=int, default=64, help="rendered ones that calibrate int8 (default: 64)")
    args = parser.parse_args()
    args.device = "cpu"
    keep_freed_memory()
    rendered = CameraPoseDataset(common.FRAMES, common.frames(args.frames, 640, 480))
    rows = []
    for name in args.models:
        weights, train, test = published() if name == "posenet-mobilenet" else (None, None, None)
        variants = variants_of(name, weights, train or rendered)
        for variant, (one, two, batches) in measure(variants, args.rounds).items():
            rows.append({"model": name, "variant": variant, "1 thread ms": float(one), "2 threads ms": float(two),
                         f"frames/s, batches of {BATCH}": float(batches), "MB": variants[variant].megabytes,
                         "median error": medians(variants[variant], test) if test else "-"})
    common.show(args, {"Exported networks": rows})


if __name__ == "__main__":
    cli.run(main)
