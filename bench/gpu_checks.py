"""What bench.gpu checks without the scripts: golden outputs, precisions, speed, waiting, torch.compile."""
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from tqdm import tqdm

from bench import golden
from bench.gpu_trial import Skipped, cropped, row
from bench.models import compare, own_process
from bench.pipeline import waiting_row
from bench.steady import without_tf32
from bench.variants import CAP_GIB, MODELS, build
from datasets.camera_poses import CameraPoseDataset
from datasets.resources import n_cores
from engine.evaluation import predict, synchronize, test_loader
from engine.run import Run
from engine.training import train_one_epoch
from engine.training_state import TrainingState
from models import SOLVERS, build_pose_encoder, freeze, infer, load_apr
from models.precision import resolve
from models.refinement import optimize, queries_of
from util.config import Config, load_config
from util.metrics import median_errors
from util.rotations import unit_poses

SAME_OUTPUT, FASTER = 1e-3, 3
WATCHED_BATCH = 8
N_REFERENCES, N_QUERIES = 120, 8  # of the solvers
BATCH_SIZES = {**{name: size for name, (_, _, size) in MODELS.items()}, "iapr": 8, "pae": 32, "refiner": 32}
GOLDEN = {"PoseNet": "posenet", "MS-Transformer": "transposenet", "PAEs": "encoder"}  # parts of the models' names


def fastest(trial):
    """What the precision 'auto' is in a training on the device. On a CPU it is left at fp32, for all makes alike."""
    return resolve("auto", trial.device) if trial.on_gpu else "fp32"


def golden_outputs(kind, trial):
    """The models of a kind compute on the device, in fp32, what the published ones do. kind: of GOLDEN, or iAPR."""
    without_tf32()
    if kind == "iAPR":
        ours, published = golden.outputs_of_iapr(trial.device, 1), golden.published("iapr")
        keys = ("rel_pose", "pose_1")  # iterating amplifies rounding
        differences = {key: golden.difference(ours[key], published[key]) for key in keys}
    else:
        names = [name for name in golden.MODELS if GOLDEN[kind] in name][:trial.scale.n_golden]
        differences = {name: max(golden.difference(value, golden.published(name)[key])
                                 for key, value in golden.outputs(name, trial.device).items()) for name in names}
    yield row(f"golden outputs, {kind}", differences, f"<= {SAME_OUTPUT}", max(differences.values()) <= SAME_OUTPUT)


def precisions(trial):
    """Tests in bf16 and fp16 have the errors of those in fp32."""
    without_tf32()
    config = load_config("config.json", "posenet", overrides=["backbone_type=mobilenet", "n_workers=0"])
    run, apr = Run(config, trial.device), load_apr("posenet", "none", config, trial.apr).to(trial.device).eval()
    with cropped(trial.scale.size):
        dataset = CameraPoseDataset(trial.dataset_path, trial.labels["test"])

    @torch.no_grad()
    def medians(precision):
        apr.precision = precision
        result = predict(run, test_loader(run, dataset), lambda batch: {"pose": infer(apr, batch["img"])["pose"]},
                         precision)
        return median_errors(result["pose"].cpu(), dataset.truth)

    in_fp32, worse = medians("fp32"), trial.scale.worse
    for precision in ("bf16", "fp16"):
        errors = medians(precision)
        yield row(f"errors in {precision}", {"m": errors[0], "deg": errors[1], "fp32 m": in_fp32[0],
                                             "fp32 deg": in_fp32[1]}, f"<= {worse} x fp32",
                  all(error <= worse * of_fp32 for error, of_fp32 in zip(errors, in_fp32)))


def speed(name, trial, process=None):
    """Training and testing against plain code, and the memory for it. process: as for bench.models.compare."""
    auto, scale = fastest(trial), trial.scale
    batch_size = scale.speed_batch or BATCH_SIZES[name]
    variants = [(name, precision, batch_size) for precision in dict.fromkeys(("plain", "fp32", auto))]
    rows = {found["precision"]: found for found in compare(variants, scale.rounds, scale.seconds, str(trial.device),
                                                           scale.size, process)}
    for precision in ("fp32", auto):
        if precision not in rows:
            raise MemoryError(f"more than {CAP_GIB} GiB in {precision}")
    plain, fp32, ours = (rows.get(precision) for precision in ("plain", "fp32", auto))
    peak = max(fp32["peak train GiB"], ours["peak train GiB"])

    def rates(what):
        return {"plain img/s": plain[what] if plain else f"none: more than {CAP_GIB} GiB", "fp32 img/s": fp32[what],
                f"auto ({auto}) img/s": ours[what], "auto / plain": ours[what] / plain[what] if plain else ""}

    figures = {**rates("train img/s"), "peak GiB": peak}
    judged = trial.on_gpu and plain is not None  # a CPU shows only that the command works
    fast = not judged or figures["auto / plain"] >= FASTER
    limit = f"peak <= {CAP_GIB} GiB" + f", auto >= {FASTER} x plain" * judged
    if name in (*MODELS, "iapr"):
        figures["% of matmul peak"] = ours["train % of matmul peak"]
    yield row(f"training {name}, batch {batch_size}", figures, limit, fast and peak <= CAP_GIB)
    if name in (*MODELS, "iapr"):
        as_fast = not judged or fp32["test img/s"] >= 0.9 * plain["test img/s"]
        yield row(f"testing {name}, batch {batch_size}",
                  {**rates("test img/s"), "fp32: one image ms": fp32["one image ms"],
                   "90th pct. ms": fp32["90th pct. ms"], "% of matmul peak": fp32["test % of matmul peak"]},
                  "fp32 >= 0.9 x plain" if judged else "none", as_fast)


def waiting(trial):
    """How long a training waits for frames; for information."""
    scale = trial.scale
    with cropped(scale.size):
        found = waiting_row(str(trial.dataset_path), str(trial.labels["train"]), min(scale.n_workers, n_cores()),
                            trial.device, scale.n_batches, scale.batch_size)
    yield row("training posenet-mobilenet waits for data", found, "none", True)


def batches_of_noise(trial):
    """Batches as a loader gives them, as many as are watched and one more."""
    random, size = torch.Generator().manual_seed(0), trial.scale.size
    n = min(trial.scale.batch_size, WATCHED_BATCH)
    for _ in range(trial.scale.n_watched + 1):
        batch = {"img": torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=random),
                 "pose": torch.nn.functional.normalize(torch.randn(n, 7, generator=random)),
                 "scene": torch.arange(n) % 7, "row": torch.arange(n)}
        yield {key: value.pin_memory() if trial.on_gpu else value for key, value in batch.items()}


@contextmanager
def watched(trial):
    """Batches; while all but the first are worked on, what makes the CPU wait for the GPU raises RuntimeError.

    The first may wait: it fills caches, and a training logs it.
    """
    def watch(mode):
        if trial.on_gpu:
            torch.cuda.set_sync_debug_mode(mode)

    def batches():
        first, *others = batches_of_noise(trial)
        yield first
        watch("error")
        yield from others
        watch("default")

    try:
        yield batches()
    finally:
        watch("default")


def training_never_waits(name, trial):
    """Training steps, with averaged weights too, wait for the GPU only where they log."""
    variant = build(name, fastest(trial), min(trial.scale.batch_size, WATCHED_BATCH), str(trial.device),
                    trial.scale.size)
    variant.model.precision = variant.precision
    run = Run(load_config("config.json", "posenet", overrides=["n_freq_print=1000"]), trial.device)
    state = TrainingState(run, variant.model, variant.loss, None)
    state.average_after(2)

    def step(batch):
        variant.images, variant.scenes, variant.poses = batch["img"], batch["scene"], batch["pose"]
        return variant.training_loss()

    with watched(trial) as batches, tqdm(disable=True) as bar:
        train_one_epoch(state, batches, step, [], bar)
    yield never_waits(f"training {name} never waits for the GPU", trial)


def testing_never_waits(name, trial):
    """The loop over a dataset's frames, such as for the latents of a PAE, does not wait for the GPU."""
    variant = build(name, "fp32", 1, str(trial.device), trial.scale.size)
    variant.model.eval()
    run = Run(load_config("config.json", "posenet"), trial.device)
    with torch.no_grad(), watched(trial) as batches:
        predict(run, batches, lambda batch: infer(variant.model, batch["img"]), name)
    yield never_waits(f"testing {name} never waits for the GPU", trial)


def never_waits(name, trial):
    """The row of steps that have not waited. Raises Skipped on a CPU, where nothing can show that."""
    if not trial.on_gpu:
        raise Skipped("needs CUDA, whose debug mode tells what waits; the steps run")
    return row(name, {"batches watched": trial.scale.n_watched}, "none waits", True)


def time_compiled(name, trial):
    """Figures of a variant with and without torch.compile; in a process of its own."""
    scale, device = trial.scale, trial.device
    variant = build(name, fastest(trial), scale.speed_batch or BATCH_SIZES[name], str(device), scale.size)

    def milliseconds_per_step():
        variant.measure("train", 3, 0)
        return float(np.median(variant.measure("train", 5, scale.seconds)))

    eager = milliseconds_per_step()
    variant.model.train().compile(backend=scale.backend)
    begin = time.perf_counter()
    variant.train()
    synchronize(device)
    cost = time.perf_counter() - begin
    compiled = milliseconds_per_step()
    return {"backend": scale.backend, "first step s": cost, "eager ms": eager, "compiled ms": compiled,
            "eager / compiled": eager / compiled, "peak GiB": variant.peak_gib()}


def compilation(name, trial, process=None):
    """What torch.compile would gain and cost; for information."""
    try:
        with nullcontext(process) if process else own_process() as executor:
            figures = executor.submit(time_compiled, name, trial).result()
    except Exception as error:  # information: it fails nothing
        raise Skipped(f"torch.compile: {(str(error).splitlines() or [type(error).__name__])[-1]}") from error
    yield row(f"torch.compile of {name}", figures, "none", True)


def solvers(trial):
    """The solvers of refinement correct poses on the device as on the CPU."""
    without_tf32()
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the encoder's weights
    truth = unit_poses(torch.randn(N_REFERENCES, 7, generator=random))
    encoder, config = build_pose_encoder("posenet", {"hidden_dim": 16}), Config({})
    freeze(encoder)
    latents = [part + 0.01 * torch.randn(part.shape, generator=random) for part in encoder(truth)]
    estimates = unit_poses(truth + 0.1 * torch.randn(truth.shape, generator=random))
    frames = queries_of({"pose": estimates, "latent_x": latents[0], "latent_q": latents[1]})
    encoder.fit_latents({**frames, "truth": truth})

    def poses(solver, device):
        queries = {key: value[:N_QUERIES].to(device) for key, value in frames.items()}
        found, refined = optimize(solver, encoder.to(device), queries, truth.to(device), frames["scene"].to(device),
                                  config)
        assert refined.all()
        return found.cpu()

    for solver in SOLVERS:
        difference = (poses(solver, trial.device) - poses(solver, torch.device("cpu"))).abs().median().item()
        yield row(f"solver {solver}", {"median difference from the CPU's": difference}, f"<= {SAME_OUTPUT}",
                  difference <= SAME_OUTPUT)
