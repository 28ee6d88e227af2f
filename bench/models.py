"""How fast the models train and test, and how much memory they need.

Every variant of a model runs in a process of its own; the processes take turns.
"""
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import common
from engine.evaluation import milliseconds
from engine.run import device_of
from models import load_apr
from models.backbones import EndpointBackbone
from models.cpu import Dropout, keep_freed_memory
from models.precision import DTYPES, autocast
from models.transformer import CrossAttention, SelfAttention
from util import cli
from util.config import DEFAULTS
from util.losses import CameraPoseLoss

CAP_GIB = 7.5  # of an 8 GB card
CONFIG = {"hidden_dim": 256, "num_scenes": 7, "dim_feedforward": 256, "learnable": True, "s_x": -3.0, "s_q": -6.5,
          "norm": 2}
MODELS = {  # name: (model, its config, published batch size)
    "posenet-mobilenet": ("posenet", {"backbone_type": "mobilenet"}, 32),
    "posenet-resnet50": ("posenet", {"backbone_type": "resnet50"}, 32),
    "posenet-efficientnet": ("posenet", {"backbone_type": "efficientnet"}, 32),
    "ms-transposenet": ("ms-transposenet", {}, 8),
    "ems-transposenet": ("ems-transposenet", {}, 8),
}
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product tells the machine's peak


class Sketch(nn.Module):
    """The bare arithmetic of MS-Transformer, a lower bound of its time.

    EfficientNet's blocks 0 to 10, and six pre-norm encoder layers on 196 and on 784 tokens; nothing else.
    """

    def __init__(self, precision):
        super().__init__()
        self.precision = precision
        self.backbone = EndpointBackbone(["reduction_4", "reduction_3"], "none")
        self.projections = nn.ModuleList(nn.Conv2d(channels, 256, kernel_size=1) for channels in (112, 40))
        self.branches = nn.ModuleList(nn.Sequential(*(SketchLayer() for _ in range(6))) for _ in range(2))

    def forward(self, data):
        """A batch of images -> 7 numbers per image, which mean nothing."""
        with autocast(self.precision, data["img"].device):
            maps = self.backbone(data["img"])
            tokens = [branch(projection(x).flatten(2).transpose(1, 2))
                      for x, projection, branch in zip(maps, self.projections, self.branches)]
        return {"pose": torch.cat([x.float().mean(dim=1) for x in tokens], dim=1)[:, :7]}


class SketchLayer(nn.Module):
    """A pre-norm encoder layer without dropout and positions."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(256, 768), nn.Linear(256, 256)
        self.linear1, self.linear2 = nn.Linear(256, 256), nn.Linear(256, 256)
        self.norm1, self.norm2 = nn.LayerNorm(256), nn.LayerNorm(256)

    def forward(self, tokens):
        """N x L x 256 -> N x L x 256."""
        query, key, value = self.in_proj(self.norm1(tokens)).unflatten(2, (3, 8, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out_proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.linear2(F.gelu(self.linear1(self.norm2(tokens))))


class PlainSelfAttention(nn.MultiheadAttention):
    """SelfAttention by PyTorch's own forward."""

    def forward(self, tokens, added):
        """As SelfAttention.forward."""
        return super().forward(tokens + added, tokens + added, tokens)[0]


class PlainCrossAttention(nn.MultiheadAttention):
    """CrossAttention by PyTorch's own forward."""

    def forward(self, query, keys, values):
        """As CrossAttention.forward."""
        return super().forward(query, keys, values)[0]


PLAIN = {SelfAttention: PlainSelfAttention, CrossAttention: PlainCrossAttention, Dropout: nn.Dropout}


class Variant:
    """A model in a precision, ready to train and test; lives in a process of its own."""

    def __init__(self, name, precision, batch_size, device):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.plain = precision == "plain"
        self.precision = "fp32" if self.plain else precision
        if self.device.type == "cuda":
            cap = CAP_GIB * 2 ** 30 / torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(cap, 1.0), self.device)
        elif not self.plain:
            keep_freed_memory()
        self.images = torch.randn(batch_size, 3, 224, 224, device=self.device)
        if name == "sketch":
            self.model = Sketch(precision).to(memory_format=torch.channels_last)
        else:
            model, config, _ = MODELS[name]
            self.model = load_apr(model, "none", {**CONFIG, **config, "precision": self.precision})
        if self.plain:
            # As one would write it first: memory and attention as PyTorch has them by default, weights of attention
            # included.
            self.model = self.model.to(memory_format=torch.contiguous_format)
            for module in self.model.modules():
                module.__class__ = PLAIN.get(type(module), type(module))
        else:
            self.images = self.images.to(memory_format=torch.channels_last)
        self.model.to(self.device)
        self.scenes = torch.arange(batch_size, device=self.device) % CONFIG["num_scenes"]
        self.poses = F.normalize(torch.randn(batch_size, 7, device=self.device))
        self.loss = CameraPoseLoss(CONFIG).to(self.device)
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=not self.plain)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def train(self):
        """A training step."""
        result = self.model({"img": self.images, "scene": self.scenes})
        loss = self.loss(result["pose"], self.poses)
        if "scene_log_distr" in result:
            loss = loss + F.nll_loss(result["scene_log_distr"], self.scenes)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.inference_mode()
    def test(self):
        """A test of one batch."""
        self.model({"img": self.images, "scene": None})

    @torch.inference_mode()
    def test_one(self):
        """A test of a single image."""
        self.model({"img": self.images[:1], "scene": None})

    @torch.inference_mode()
    def test_published_batch(self):
        """A test of one batch of the published size."""
        self.model({"img": self.images[:1].expand(DEFAULTS["test_batch_size"], -1, -1, -1), "scene": None})

    def multiply(self):
        """A product of two large matrices, for the machine's peak."""
        side, dtype = MATRIX[self.device.type], DTYPES.get(self.precision, torch.float32)
        matrix = torch.ones(side, side, dtype=dtype, device=self.device)
        return matrix @ matrix

    def gflop(self):
        """GFLOP per image of a test."""
        with FlopCounterMode(display=False) as counter:  # which needs gradients
            self.model.eval()({"img": self.images[:1], "scene": None})
        return counter.get_total_flops() / 1e9

    def peak_gib(self):
        """The peak of memory so far: the allocator's on a GPU, the whole process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2 ** 30
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2 ** 20


_variant = None


def prepare(*arguments):
    """Build this process's variant. Returns its GFLOP per image, and the peak memory of tests and of training."""
    global _variant
    _variant = Variant(*arguments)
    peaks = []
    for what in ("test_published_batch", "train"):
        measure(what, 2, 0)
        peaks.append(_variant.peak_gib())
    return _variant.gflop(), *peaks


def measure(what, n, seconds):
    """Milliseconds of each of at least n calls, for at least some seconds.

    On a GPU ten calls are timed at once: as in a training, nothing waits between them.
    """
    _variant.model.train(what == "train")
    on_gpu = _variant.device.type == "cuda"
    at_once = 10 if on_gpu and what != "test_one" else 1
    elapsed_ms = []
    end = time.monotonic() + seconds
    while len(elapsed_ms) < n or time.monotonic() < end:
        total_ms, _ = milliseconds(lambda: [getattr(_variant, what)() for _ in range(at_once)], _variant.device)
        elapsed_ms.append(total_ms / at_once)
    if on_gpu:
        torch.cuda.empty_cache()  # for the variants whose turn is next
    return elapsed_ms


def compare(variants, rounds, seconds, device):
    """Rows of a table: `variants`, (name, precision, batch size), measured in turns of some seconds."""
    times = {variant: {what: [] for what in ("train", "test", "test_one", "multiply")} for variant in variants}
    with ExitStack() as stack:
        processes = {variant: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for variant in variants}
        needs = {}
        for variant, process in processes.items():
            try:
                needs[variant] = process.submit(prepare, *variant, device).result()
            except torch.cuda.OutOfMemoryError:
                print(f"{variant}: more than {CAP_GIB} GiB")
                del times[variant]
        for i in range(rounds + 1):
            for variant in times:
                for what, elapsed_ms in times[variant].items():
                    n_calls = 1 if what in ("train", "test") else 5
                    result = processes[variant].submit(measure, what, n_calls, seconds).result()
                    elapsed_ms += result if i else []  # the first round warms up
    rows = []
    for variant in times:
        train, test, one, multiply = (np.median(times[variant][what]) for what in times[variant])
        gflop, test_peak, train_peak = needs[variant]
        tflops = 2 * MATRIX[torch.device(device).type] ** 3 / multiply / 1e9
        size = variant[2]
        rows.append({
            "model": variant[0], "precision": variant[1], "batch": size,
            "train img/s": 1000 * size / train, "test img/s": 1000 * size / test,
            "one image ms": float(one), "90th pct. ms": float(np.percentile(times[variant]["test_one"], 90)),
            "peak train GiB": train_peak, "peak test GiB": test_peak,
            f"% of {CAP_GIB} GiB": 100 * max(train_peak, test_peak) / CAP_GIB, "GFLOP/img": gflop,
            "train % of matmul peak": float(100 * 3 * gflop * size / train / tflops),
            "test % of matmul peak": float(100 * gflop * size / test / tflops), "matmul TFLOP/s": float(tflops),
        })
    return rows


def ratios(rows):
    """Rows of a table: each variant's speed relative to the plain variant and to the sketch."""
    by_name = {(row["model"], row["precision"]): row for row in rows}
    compared = []
    for row in rows:
        for other, label in ((by_name.get((row["model"], "plain")), "plain"),
                             (by_name.get(("sketch", row["precision"])), "sketch")):
            if other and other is not row:
                compared.append({"model": row["model"], "precision": row["precision"], "batch": row["batch"],
                                 "against": label,
                                 "train: times as fast": row["train img/s"] / other["train img/s"],
                                 "test: times as fast": row["test img/s"] / other["test img/s"],
                                 "one image: times as fast": other["one image ms"] / row["one image ms"]})
    return compared


def profile(name, device):
    """Print where a training step of a model spends its time."""
    variant = Variant(name, "bf16" if device.type == "cuda" else "fp32", MODELS[name][2], device)
    for _ in range(3):
        variant.train()
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiled:
        variant.train()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def main():
    """Run the benchmark that the command line asks for."""
    parser = common.parser("models", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--precisions", nargs="+", choices=("plain", "fp32", "bf16", "fp16"),
                        help="plain: fp32 without any of our ways (default: plain fp32 bf16, on a GPU fp16 too)")
    parser.add_argument("--batch_sizes", metavar="N", nargs="+", type=int, help="(default: the published one)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument("--seconds", type=float, default=1, help="of a turn, per kind of measurement (default: 1)")
    parser.add_argument("--profile", choices=MODELS,
                        help="only show where a training step of this model spends its time")
    args = parser.parse_args()
    device = device_of(args.device)
    if args.profile:
        return profile(args.profile, device)
    precisions = args.precisions or ["plain", "fp32", "bf16", *["fp16"] * (device.type == "cuda")]
    tables = {"Models": [], "Compared": []}
    for name in args.models:
        for batch_size in args.batch_sizes or [MODELS[name][2]]:
            variants = [(name, precision, batch_size) for precision in precisions]
            if name == "ems-transposenet":
                variants += [("sketch", precision, batch_size) for precision in precisions if precision != "plain"]
            rows = compare(variants, args.rounds, args.seconds, str(device))
            tables["Models"] += rows
            tables["Compared"] += ratios(rows)
            print(name, batch_size, "done", flush=True)
    common.show(args, {title: rows for title, rows in tables.items() if rows})


if __name__ == "__main__":
    cli.run(main)
