"""The checks of a GPU run, small, on a CPU; one that fails is told, and so is the command's exit status."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_module_here

from bench import golden, gpu, gpu_checks
from bench.gpu_trial import CPU, GPU
from models import SOLVERS

PASSED = ["golden outputs, PoseNet", "golden outputs, MS-Transformer", "golden outputs, PAEs", "golden outputs, iAPR",
          *(f"solver {name}" for name in SOLVERS), "killed and resumed",
          "errors in bf16", "errors in fp16", "two processes on one device, gloo",
          "training posenet-mobilenet waits for data",
          *(f"{mode} {name}, batch 2" for name in (*CPU.timed, "iapr") for mode in ("training", "testing")),
          "training pae, batch 2", "training refiner, batch 2"]
NEED_CUDA = ["state moved from GPU to CPU and back", "two processes on two GPUs, NCCL",
             *(f"{mode} {name} never waits for the GPU" for name in ("posenet-mobilenet", "ems-transposenet")
               for mode in ("training", "testing")),
             *(f"training {name} never waits for the GPU" for name in ("pae", "refiner", "iapr"))]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the command on the CPU; returns its exit status and its rows, {check: row}."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        status, output, errors = run_module_here(gpu, "--device", "cpu", "--json", tmp_path / "gpu.json", *arguments)
        assert "\n| check | figures | limit | result |\n" in output, errors
        rows = json.loads((tmp_path / "gpu.json").read_text())["Checks (small, on a CPU)"]
        return status, {row["check"]: row for row in rows}

    return run


def test_every_check_runs_small_on_a_cpu(run):
    status, rows = run()
    compiled = rows.pop("torch.compile of pae")  # information, and not available everywhere
    assert compiled["result"] in ("passed", "skipped")
    assert {name for name, row in rows.items() if row["result"] == "passed"} == set(PASSED), rows
    assert {name for name, row in rows.items() if row["result"] == "skipped"} == set(NEED_CUDA)
    assert all("need" in rows[name]["figures"] for name in NEED_CUDA)
    assert status == 0
    assert rows["killed and resumed"]["figures"]["largest difference of weights"] <= 1e-5
    for name in CPU.timed:
        assert rows[f"training {name}, batch 2"]["figures"]["auto / plain"] > 0


def test_a_check_that_fails_and_one_that_raises_are_told(run, monkeypatch):
    published = golden.published

    def wrong(name):
        return {key: value * 1.01 for key, value in published(name).items()} if name == "pose-encoder" else (
            published(name))

    def broken(*args):
        raise ValueError("first line\nlast line")

    monkeypatch.setattr(golden, "published", wrong)
    monkeypatch.setattr(golden, "outputs_of_iapr", broken)
    status, rows = run("--only", "golden")
    assert status == 1
    assert [row["result"] for row in rows.values()] == ["passed", "passed", "failed", "failed"]
    assert abs(rows["golden outputs, PAEs"]["figures"]["pose-encoder"] - 0.01 / 1.01) < 1e-5
    assert rows["golden outputs, iAPR"]["figures"].startswith("ValueError: last line (")


@pytest.mark.parametrize("speeds, peak, training, testing", [
    ({"plain": 10, "fp32": 20, "bf16": 30}, 7, "passed", "passed"),
    ({"plain": 10, "fp32": 20, "bf16": 29}, 7, "failed", "passed"),
    ({"plain": 10, "fp32": 8, "bf16": 31}, 7, "passed", "failed"),
    ({"plain": 10, "fp32": 20, "bf16": 30}, 7.6, "failed", "passed"),
    ({"fp32": 20, "bf16": 30}, 7, "passed", "passed"),  # plain code needs more memory than there is
    ({"plain": 10, "fp32": 20}, 7, "failed", None),
])
def test_speed_and_memory_are_judged_on_a_gpu(monkeypatch, speeds, peak, training, testing):
    monkeypatch.setattr(gpu_checks, "fastest", lambda trial: "bf16")
    monkeypatch.setattr(gpu_checks, "compare", lambda variants, *args: [
        {"precision": precision, "train img/s": speeds[precision], "test img/s": speeds[precision],
         "peak train GiB": peak, "one image ms": 1.0, "90th pct. ms": 2.0, "train % of matmul peak": 50.0,
         "test % of matmul peak": 50.0} for _, precision, _ in variants if precision in speeds])
    trial = SimpleNamespace(device=torch.device("cuda", 0), on_gpu=True, scale=GPU)
    rows = gpu.rows_of("training ms-transposenet", lambda trial: gpu_checks.speed("ms-transposenet", trial), trial)
    assert [row["result"] for row in rows] == [result for result in (training, testing) if result]
    if testing is None:
        assert "more than 7.5 GiB in bf16" in rows[0]["figures"]
