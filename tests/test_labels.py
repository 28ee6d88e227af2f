"""`python -m datasets.labels`: what it finds in published and in made label files, and what it fixes."""
import json
import os
import re

import pandas as pd
import pytest
from conftest import MINI, ROOT, SHARED, run_module_here, run_script, write_labels

from datasets import labels
from datasets.descriptions import describe

LABELS = SHARED / "data" / "labels"
needs_published_labels = pytest.mark.skipif(not LABELS.is_dir(), reason="the published label files are not at hand")
SIGN, OUTLIER, UNIT = "other sign", "median position", "norm is"


def check(path, *more):
    return run_module_here(labels, "check", path, *more)


def counts(output):
    return {kind: sum(kind in line for line in output.splitlines()[:-1]) for kind in (SIGN, OUTLIER, UNIT)}


# What a look at the files with pandas alone finds (dot products of following rows, norms, distances from the median).
@needs_published_labels
@pytest.mark.parametrize("path, signs, outliers, not_unit", [
    (LABELS / "abs_cambridge_pose_sorted.csv_GreatCourt_train.csv", 34, 1, 0),
    (LABELS / "abs_cambridge_pose_sorted.csv_ShopFacade_train.csv", 4, 0, 0),
    (LABELS / "abs_cambridge_pose_sorted.csv_ShopFacade_test.csv", 0, 0, 0),
    (LABELS / "abs_cambridge_pose_sorted.csv_KingsCollege_train.csv", 0, 0, 0),
    (LABELS / "abs_cambridge_pose_sorted.csv_KingsCollege_test.csv", 0, 0, 0),
    (LABELS / "cambridge_four_scenes.csv", 8, 0, 5),
    (LABELS / "7scenes_all_scenes.csv", 1, 0, 0),
    (MINI / "expected_train.csv", 0, 0, 0),
    (MINI / "expected_test.csv", 0, 0, 0),
], ids=lambda value: getattr(value, "name", None))
def test_published_label_files(tmp_path, path, signs, outliers, not_unit):
    status, output, _ = check(path)
    assert counts(output) == {SIGN: signs, OUTLIER: outliers, UNIT: not_unit}
    assert len(output.splitlines()) == signs + outliers + not_unit + 1  # and nothing else, but the summary
    assert status == (1 if signs + outliers + not_unit else 0)

    fixed = tmp_path / "fixed.csv"
    assert run_module_here(labels, "fix", path, fixed)[0] == 0
    before, after = pd.read_csv(path), pd.read_csv(fixed)
    assert len(after) == len(before) - outliers
    status, output, _ = check(fixed)
    assert (output, status) == (f"{fixed}: {len(after)} frames, nothing suspicious\n", 0)
    kept = before.set_index("img_path").loc[after["img_path"]]
    assert (kept[["t1", "t2", "t3"]].to_numpy() == after[["t1", "t2", "t3"]].to_numpy()).all()
    old, new = (table[["q1", "q2", "q3", "q4"]].to_numpy() for table in (kept, after))
    assert abs(abs((old * new).sum(axis=1)) - (old ** 2).sum(axis=1) ** 0.5).max() < 2e-3  # the same rotations


def frame(i, position="1,2,3", quaternion="1,0,0,0", scene="a", seq="s1"):
    return f"{scene},train,{seq},{scene}/{seq}/{i}.png,{position},{quaternion}"


@pytest.fixture
def flawed(tmp_path):
    around = [frame(i, position=f"{i % 3},{i % 2},0") for i in range(1, 12)]  # frame 10 follows 9, not 1
    around[8] = frame(9, position="0,1,0", quaternion="0.8,0,0,-0.6")
    around[9] = frame(10, position="1,0,0", quaternion="-0.8,0,0,0.59")
    around[10] = frame(11, position="2,1,0", quaternion="0.8,0,0,-0.6")
    rows = around + [
        frame(12, position="0,0,700", quaternion="0.8,0,0,-0.6"),  # row 13
        frame(13, position="0,nan,0"),
        around[0],  # row 15
        frame(2, position="0.5,0,0"),  # the same image, another pose
        frame(1, position="700,0,0", scene="b"),  # row 17: far from scene a, but alone in its own
        frame(14) + ",1",
        frame(1, seq="s2", quaternion="-1,0,0,0"),  # another sequence begins with a sign of its own
    ]
    for row in rows[:-1]:
        path = tmp_path / row.split(",")[3]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return write_labels(tmp_path / "flawed.csv", rows)


def test_every_kind_of_flaw_is_found_in_its_row(flawed):
    process = run_script("-m", "datasets.labels", "check", flawed, "--dataset_path", flawed.parent, cwd=ROOT)
    assert (process.returncode, process.stderr) == (1, "")
    *lines, summary = process.stdout.splitlines()
    found = [(int(row), re.sub(r"\d+(\.\d+)?", "N", text)) for row, text in (line[4:].split(": ", 1) for line in lines)]
    before = "the quaternion has the other sign than the frame before it, a/sN/N.png"
    folder = re.sub(r"\d+(\.\d+)?", "N", str(flawed.parent))
    assert found == [
        (11, before), (11, "the quaternion's norm is N, not N"), (12, before),
        (13, "the position is N times as far from the scene's median position as half of the frames are"),
        (14, "tN 'nan' is not a finite number"), (15, "image a/sN/N.png is listed in row N already"),
        (16, "image a/sN/N.png is listed in row N already"), (18, "N cells, but the header has N"),
        (19, f"image {folder}/a/sN/N.png does not exist"),
    ]
    assert summary.startswith(f"{flawed}: ") and "missing image: 1" in summary and "image listed twice: 2" in summary


def test_fix_says_what_it_did(flawed, tmp_path):
    fixed, description = tmp_path / "fixed.csv", {"unit": "model units", "convention": "colmap"}
    flawed.with_suffix(".json").write_text(json.dumps(description))
    status, output, _ = run_module_here(labels, "fix", flawed, fixed)
    assert describe(fixed) == description
    rows = [int(line.split(":")[0].removeprefix("row ")) for line in output.splitlines()[:-1]]
    assert status == 0 and rows == [11, 11, 13, 14, 15, 18]
    table = pd.read_csv(fixed)
    assert len(table) == 14
    ten = table[table["img_path"] == "a/s1/10.png"].iloc[0]
    assert [ten["q1"], ten["q4"]] == pytest.approx([0.8 / 0.99403219, -0.59 / 0.99403219], abs=1e-7)
    assert table[table["img_path"] == "a/s2/1.png"].iloc[0]["q1"] == -1
    # What cannot be fixed is kept, and reported.
    assert output.splitlines()[-1] == f"{fixed}: 14 frames, image listed twice: 1"


def test_fix_leaves_no_outlier(tmp_path):
    """The farthest are found first; without them the others are far outside what is left."""
    places = (0, 1, -1, 1.2, -1.1, 11, -11.5, 12, -12.5, 200, 300)
    path = write_labels(tmp_path / "spread.csv", [frame(i, position=f"{x},0,0") for i, x in enumerate(places)])
    assert run_module_here(labels, "fix", path, tmp_path / "fixed.csv")[0] == 0
    assert check(tmp_path / "fixed.csv")[0] == 0
    left = list(pd.read_csv(tmp_path / "fixed.csv")["t1"])
    assert left[:5] == [0, 1, -1, 1.2, -1.1] and 12.5 not in map(abs, left)


@pytest.mark.parametrize("arguments, words", [
    (["check", "absent.csv"], ["absent.csv: not a readable label file: No such file"]),
    (["check", "header.csv"], ["header.csv: no rows"]),
    (["check", "flawed.csv", "--dataset_path", "nowhere"], ["--dataset_path nowhere: no such folder"]),
    (["fix", "flawed.csv", "./flawed.csv"], ["./flawed.csv is the file to fix"]),
    (["fix", "unreadable.csv", "out.csv"], ["unreadable.csv: no readable row"]),
    (["fix", "flawed.csv", "pipe"], ["pipe: cannot be written: it is not a file"]),
    (["fix", "flawed.csv", "flawed.csv/out.csv"], ["flawed.csv/out.csv: cannot be written"]),
])
def test_bad_input_ends_in_one_line(flawed, monkeypatch, arguments, words):
    monkeypatch.chdir(flawed.parent)
    os.mkfifo("pipe")
    write_labels(flawed.parent / "header.csv", [])
    write_labels(flawed.parent / "unreadable.csv", [frame(1, position="x,y,z")])
    before = {path.name: path.read_bytes() for path in flawed.parent.glob("*.csv")}
    status, _, error = run_module_here(labels, *arguments)
    assert status == 2 and error.count("\n") == 1 and all(word in error for word in words)
    assert {path.name: path.read_bytes() for path in flawed.parent.glob("*.csv")} == before
