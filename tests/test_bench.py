"""The benchmarks run and write what they print."""
import json

import pytest
from conftest import ROOT, run_well, write_labels, write_scene


@pytest.mark.parametrize("name, arguments, rows", [
    ("models", ["--models", "ems-transposenet", "--precisions", "fp32", "--batch_sizes", "1", "--rounds", "1"],
     {"Models": 2, "Compared": 1}),
    ("pae", ["--times", "1", "2"], {"PAE and refiner of PoseNet MobileNetV2": 4}),
])
def test_a_benchmark_prints_its_tables_and_writes_them(tmp_path, name, arguments, rows):
    if name == "pae":
        labels = write_labels(tmp_path / "labels.csv", write_scene(tmp_path, "attic", 6, "train"))
        arguments = [*arguments, "--dataset_path", tmp_path, "--labels_file", labels]
    output = run_well("-m", f"bench.{name}", *arguments, "--json", tmp_path / "result.json", cwd=ROOT)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {title: len(table) for title, table in result.items() if title != "machine"} == rows
    for title in rows:
        assert f"\n{title}\n\n| {' | '.join(result[title][0])} |\n" in output
        assert all(not isinstance(cell, float) or cell > 0 for row in result[title] for cell in row.values())
