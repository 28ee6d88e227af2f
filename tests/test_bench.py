"""The benchmarks run and write what they print."""
import importlib
import json

import pytest
from conftest import ROOT, run_here, run_module_here, write_labels, write_scene

from bench import refinement


@pytest.mark.parametrize("name, arguments, rows", [
    ("models", ["--models", "ems-transposenet", "--precisions", "fp32", "--batch_sizes", "1", "--rounds", "1"],
     {"Models": 2, "Compared": 1}),
    ("pae", ["--times", "1", "2"], {"PAE and refiner of PoseNet MobileNetV2": 4}),
])
def test_a_benchmark_prints_its_tables_and_writes_them(tmp_path, monkeypatch, name, arguments, rows):
    monkeypatch.chdir(ROOT)
    if name == "pae":
        labels = write_labels(tmp_path / "labels.csv", write_scene(tmp_path, "attic", 6, "train"))
        arguments = [*arguments, "--dataset_path", tmp_path, "--labels_file", labels]
    status, output, errors = run_module_here(importlib.import_module(f"bench.{name}"), *arguments, "--json", tmp_path / "result.json")
    assert status == 0, errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert {title: len(table) for title, table in result.items() if title != "machine"} == rows
    for title in rows:
        assert f"\n{title}\n\n| {' | '.join(result[title][0])} |\n" in output
        assert all(not isinstance(cell, float) or cell > 0 for row in result[title] for cell in row.values())


def test_the_benchmark_of_refinement_goes_on_from_what_is_done(tmp_path, monkeypatch):
    labels = [write_labels(tmp_path / f"{split}.csv", write_scene(tmp_path, "attic", n, split)) for split, n in (("train", 20), ("test", 10))]
    scene = tuple(map(str, (tmp_path, *labels)))
    commands = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(refinement, "scenes", lambda folder, real: dict.fromkeys(("room-1", "room-2", "yard-1"), scene))
    monkeypatch.setattr(refinement, "run", lambda *command: commands.append(command) or run_here(*command).splitlines()[-1])
    monkeypatch.setattr(refinement, "RENDERED", {"mobilenet": ["n_epochs=1", "n_workers=0", "average_last=0"]})
    monkeypatch.setattr(refinement, "AUXILIARY", ["n_epochs=1", "n_workers=0"])
    arguments = ["--folder", tmp_path / "bench", "--json", tmp_path / "result.json", "--seeds", "1", "--only", "mobilenet"]
    status, first, _ = run_module_here(refinement, *arguments)
    assert status == 0 and len(commands) == 9  # APR, PAE and refiner of three scenes
    [title] = [title for title in json.loads((tmp_path / "result.json").read_text()) if title.startswith("Refinement")]
    rows = json.loads((tmp_path / "result.json").read_text())[title]
    assert [row["method"] for row in rows] == 2 * refinement.METHODS and rows[0]["data"] == "rooms, MobileNetV2 x 1"
    assert all(row["position m"] > 0 and (row["method"] == "APR") == (row["change of position"] == "") for row in rows)
    (tmp_path / "bench" / "room-2-mobilenet-0" / "refiner.pth").unlink()
    again = run_module_here(refinement, *arguments)[1]
    assert len(commands) == 10 and json.loads((tmp_path / "result.json").read_text())[title] == rows
    assert "room-2-mobilenet-0/refiner.pth" in again
