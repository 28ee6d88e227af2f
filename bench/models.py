"""How fast the models train and test, and how much memory they need.

Every variant of a model runs in a process of its own; the processes take turns.
"""
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context

import numpy as np
import torch

from bench import common
from bench.variants import CAP_GIB, MODELS, SIZE, build, matrix_side
from engine.run import device_of
from util import cli

_variants = {}  # of this process: the arguments of `prepare` -> what it built


def own_process():
    """A process of its own, as an executor."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def prepare(*arguments):
    """Build a variant in this process. Returns its GFLOP per image, and the peak memory of tests and of training."""
    variant = _variants[arguments] = build(*arguments)
    peaks = []
    for what in ("test_published_batch", "train"):
        variant.measure(what, 2, 0)
        peaks.append(variant.peak_gib())
    return variant.gflop(), *peaks


def measure(arguments, *what):
    """Measure a variant that `prepare` has built from these arguments; see Variant.measure."""
    return _variants[arguments].measure(*what)


def compare(variants, rounds, seconds, device, pixels=SIZE, process=None):
    """Rows of a table: `variants`, (name, precision, batch size), measured in turns of some seconds.

    pixels: height and width of the images. process: an executor for all variants together (default: a process for
    each). A variant that needs more than CAP_GIB has no row.
    """
    times = {variant: {what: [] for what in ("train", "test", "test_one", "multiply")} for variant in variants}
    with ExitStack() as stack:
        processes = {variant: process or stack.enter_context(own_process()) for variant in variants}
        needs = {}
        for variant in variants:
            try:
                needs[variant] = processes[variant].submit(prepare, *variant, device, pixels).result()
            except torch.cuda.OutOfMemoryError:
                print(f"{variant}: more than {CAP_GIB} GiB")
                del times[variant]
        for i in range(rounds + 1):
            for variant in times:
                for what, elapsed_ms in times[variant].items():
                    n_calls = 1 if what in ("train", "test") or not seconds else 5
                    arguments = (*variant, device, pixels)
                    result = processes[variant].submit(measure, arguments, what, n_calls, seconds).result()
                    elapsed_ms += result if i else []  # the first round warms up
        if process:
            process.submit(_variants.clear).result()
    rows = []
    for variant in times:
        train, test, one, multiply = (np.median(times[variant][what]) for what in times[variant])
        gflop, test_peak, train_peak = needs[variant]
        tflops = 2 * matrix_side(device, pixels) ** 3 / multiply / 1e9
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
    variant = build(name, "bf16" if device.type == "cuda" else "fp32", MODELS[name][2], device)
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
