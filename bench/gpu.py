"""Whether everything works on a GPU: outputs, precisions, speed, memory, waiting, resuming, several processes.

One table with a row per check, in at most 25 minutes; the exit status is 1 where a row has failed. On a CPU the checks
are small: they show that the command works, and nothing about speed.
"""
import gc
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from bench import common, gpu_checks, gpu_scripts
from bench.gpu_trial import CPU, GPU, Skipped, Trial
from bench.models import own_process
from engine.run import device_of
from util import cli

ROOT = Path(__file__).parent.parent
LAST_START = 20  # minutes after which no further check begins


GROUPS = ("golden", "solvers", "resume", "precision", "processes", "waiting", "speed", "compile")


def checks(trial, process):
    """All checks, {group: [(name, function)]}. A function is given the trial, and gives rows or raises Skipped.

    process: an executor in which models are timed, None: a process for each.
    """
    return {
        "golden": [(f"golden outputs, {kind}", partial(gpu_checks.golden_outputs, kind))
                   for kind in (*gpu_checks.GOLDEN, "iAPR")],
        "solvers": [("solvers", gpu_checks.solvers)],
        "resume": [("killed and resumed", gpu_scripts.resume),
                   ("state moved from GPU to CPU and back", gpu_scripts.move)],
        "precision": [("errors in bf16 and fp16", gpu_checks.precisions)],
        "processes": [("two processes on one device, gloo", gpu_scripts.gloo),
                      ("two processes on two GPUs, NCCL", gpu_scripts.nccl)],
        "waiting": [
            *((f"training {name} never waits for the GPU", partial(gpu_checks.training_never_waits, name))
              for name in ("posenet-mobilenet", "ems-transposenet", "pae", "refiner", "iapr")),
            *((f"testing {name} never waits for the GPU", partial(gpu_checks.testing_never_waits, name))
              for name in ("posenet-mobilenet", "ems-transposenet")),
            ("training posenet-mobilenet waits for data", gpu_checks.waiting)],
        "speed": [(f"training {name}", partial(gpu_checks.speed, name, process=process))
                  for name in (*trial.scale.timed, "pae", "refiner", "iapr")],
        "compile": [(f"torch.compile of {name}", partial(gpu_checks.compilation, name, process=process))
                    for name in trial.scale.compiled],
    }


def rows_of(name, check, trial):
    """The rows of a check. One that cannot run is a row too; an exception is a failure, with its last line."""
    rows, result = [], None
    try:
        for found in check(trial):
            rows.append(found)
    except Skipped as reason:
        result = "skipped", str(reason)
    except Exception as error:
        frame = next((frame for frame in reversed(traceback.extract_tb(error.__traceback__))
                      if Path(frame.filename).is_relative_to(ROOT) and "site-packages" not in frame.filename), None)
        text = (str(error).strip().splitlines() or [""])[-1]
        where = f" ({Path(frame.filename).name}:{frame.lineno})" if frame else ""
        result = "failed", f"{type(error).__name__}: {text}{where}"
    if result:
        rows.append({"check": name, "figures": result[1], "limit": "", "result": result[0]})
    return rows


def run_checks(trial, groups, process):
    """The rows of all checks of these groups, each printed when it is finished."""
    rows, begin = [], time.monotonic()
    of_groups = checks(trial, process)
    for group in groups:
        for name, check in of_groups[group]:
            since = time.monotonic()
            if since - begin > 60 * LAST_START:
                found = [{"check": name, "figures": f"{LAST_START} minutes are over", "limit": "", "result": "skipped"}]
            else:
                found = rows_of(name, check, trial)
            for row in found:
                print(f"{row['result']}: {row['check']} ({time.monotonic() - since:.1f} s)", flush=True)
            rows += found
            gc.collect()
            if trial.on_gpu:
                torch.cuda.empty_cache()  # other processes need the memory
    return rows


def main():
    """Run the checks that the command line asks for. Exit status 1: at least one has failed."""
    parser = common.parser("gpu", __doc__)
    parser.add_argument("--only", metavar="GROUP", nargs="+", choices=GROUPS, default=GROUPS,
                        help=f"run only some checks: {', '.join(GROUPS)} (default: all)")
    args = parser.parse_args()
    device = device_of(args.device)
    with tempfile.TemporaryDirectory() as folder, nullcontext() if device.type == "cuda" else own_process() as process:
        trial = Trial(device, GPU if device.type == "cuda" else CPU, folder)
        rows = run_checks(trial, args.only, process)
    common.show(args, {"Checks" + " (small, on a CPU)" * (device.type == "cpu"): rows})
    counts = {result: sum(row["result"] == result for row in rows) for result in ("passed", "failed", "skipped")}
    print(f"{device}:", ", ".join(f"{n} {result}" for result, n in counts.items()))
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    cli.run(main)
