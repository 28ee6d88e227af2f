"""The benchmarks run and write what they print."""
import functools
import importlib
import json

import pytest
import torch
from conftest import ROOT, run_here, run_module_here, write_labels, write_scene

from bench import models, refinement
from bench.variants import Variant


@pytest.mark.parametrize("name, arguments, rows", [
    ("models", ["--models", "posenet-mobilenet", "--precisions", "plain", "fp32", "--batch_sizes", "1", "--rounds", "1",
                "--seconds", "0.1"], {"Models": 2, "Compared": 1}),
    ("pae", ["--times", "2"], {"PAE and refiner of PoseNet MobileNetV2": 2}),
    ("export", ["--models", "posenet-efficientnet", "--rounds", "1", "--frames", "2"], {"Exported networks": 4}),
])
def test_a_benchmark_prints_its_tables_and_writes_them(tmp_path, monkeypatch, name, arguments, rows):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "compare", functools.partial(models.compare, pixels=64))  # smaller, to save time
    if name == "pae":
        labels = write_labels(tmp_path / "labels.csv", write_scene(tmp_path, "attic", 6, "train"))
        arguments = [*arguments, "--dataset_path", tmp_path, "--labels_file", labels]
    json_file, n_threads = tmp_path / "result.json", torch.get_num_threads()
    status, output, errors = run_module_here(importlib.import_module(f"bench.{name}"), *arguments, "--json", json_file)
    assert status == 0, errors
    assert torch.get_num_threads() == n_threads  # else all later tests wait for each other
    result = json.loads(json_file.read_text())
    assert {title: len(table) for title, table in result.items() if title != "machine"} == rows
    for title in rows:
        assert f"\n{title}\n\n| {' | '.join(result[title][0])} |\n" in output
        assert all(not isinstance(cell, float) or cell > 0 for row in result[title] for cell in row.values())


@pytest.mark.parametrize("name, precision", [("ems-transposenet", "plain"), ("sketch", "fp32")])
def test_every_variant_of_ms_transformer_trains_and_tests(name, precision):
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    variant = Variant(name, precision, 1, "cpu")
    before = [parameter.clone() for parameter in variant.model.parameters()]
    variant.train()
    changed = [not torch.equal(old, new) for old, new in zip(before, variant.model.parameters(), strict=True)]
    assert sum(changed) > 100
    variant.model.eval()
    variant.test()
    variant.test_one()
    assert variant.gflop() > 1 and torch.get_num_threads() == n_threads
    torch.set_rng_state(state)


def test_ms_transformer_is_compared_with_the_plain_variant_and_with_its_sketch(tmp_path, monkeypatch):
    speeds = {"plain": 1.0, "fp32": 2.0, "sketch": 3.0}  # images per second

    def compare(variants, *args):
        rows = []
        for name, precision, batch_size in variants:
            speed = speeds["sketch" if name == "sketch" else precision]
            rows.append({"model": name, "precision": precision, "batch": batch_size, "train img/s": speed,
                         "test img/s": speed, "one image ms": 1000 / speed})
        return rows

    monkeypatch.setattr(models, "compare", compare)
    arguments = ["--models", "ems-transposenet", "--precisions", "plain", "fp32", "--json", tmp_path / "result.json"]
    status, _, errors = run_module_here(models, *arguments)
    assert status == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["model"], row["precision"], row["batch"]) for row in result["Models"]] == [
        ("ems-transposenet", "plain", 8), ("ems-transposenet", "fp32", 8), ("sketch", "fp32", 8)]
    compared = {(row["model"], row["against"]): row for row in result["Compared"]}
    for against, ratio in (("plain", 2), ("sketch", 2 / 3)):
        row = compared.pop(("ems-transposenet", against))
        assert all(abs(row[f"{what}: times as fast"] - ratio) < 1e-9 for what in ("train", "test", "one image"))
    assert not compared


def test_the_benchmark_of_refinement_continues_from_what_is_finished(tmp_path, monkeypatch, small_frames):
    labels = [write_labels(tmp_path / f"{split}.csv", write_scene(tmp_path, "attic", n, split))
              for split, n in (("train", 40), ("test", 10))]
    scene = tuple(map(str, (tmp_path, labels[0], *labels)))
    commands = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(refinement, "scenes", lambda folder, real: dict.fromkeys(
        ("room-1", "room-2", "yard-1", "excursion-1"), scene))
    monkeypatch.setattr(refinement, "run_script", lambda *command: (
        commands.append(command) or run_here(*command).splitlines()))
    monkeypatch.setattr(refinement, "RENDERED", {"mobilenet": ["n_epochs=1", "n_workers=0", "average_last=0"]})
    monkeypatch.setattr(refinement, "AUXILIARY", ["n_epochs=1", "n_workers=0"])
    monkeypatch.setattr(refinement, "N_QUERIES", 10)
    monkeypatch.setattr(refinement, "N_REFERENCES", 40)
    json_file = tmp_path / "result.json"
    arguments = ["--folder", tmp_path / "bench", "--json", json_file, "--seeds", "1", "--only", "mobilenet"]
    status, first, _ = run_module_here(refinement, *arguments)
    assert status == 0 and len(commands) == 12  # APR, PAE and refiner of four scenes
    result = json.loads(json_file.read_text())
    [title], [of_novelty] = ([title for title in result if title.startswith(begin)]
                             for begin in ("Refinement", "Novelty"))
    rows = result[title]
    assert [row["data"] for row in result[of_novelty]] == [
        f"{name}, MobileNetV2 x 1" for name in ("rooms", "yard", "excursion")]
    assert all(0 <= row["AUROC of strangers"] <= 1 for row in result[of_novelty])
    methods = [method for method in refinement.METHODS if method != "iAPR"]  # which is for MS-Transformer
    assert [row["method"] for row in rows] == 3 * methods and rows[0]["data"] == "rooms, MobileNetV2 x 1"
    assert all(row["position m"] > 0 and (row["method"] == "APR") == (row["change of position"] == "") for row in rows)
    (tmp_path / "bench" / "room-2-mobilenet-0" / "refiner.pth").unlink()
    again = run_module_here(refinement, *arguments)[1]
    assert len(commands) == 13 and json.loads(json_file.read_text())[title] == rows
    assert "room-2-mobilenet-0/refiner.pth" in again
