"""`make demo`, in short: fewer frames and epochs, the same commands."""
import re
import shlex
import sys

import pandas as pd
import pytest
from conftest import ROOT, run_here

import demo
from engine.scripts import run_script


@pytest.fixture
def short_demo(tmp_path, monkeypatch, small_frames):
    """The repository in a folder of its own, where the demo's commands are cut short behind the user's back."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "out":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    monkeypatch.chdir(tmp_path)
    run, commands = demo.run, []

    def run_short(*command):
        commands.append(command)
        more = ["--frames", "6", "--width", "64"] if "datasets.synthetic_scenes" in command else []
        return run(*command, *more, *["n_epochs=1", "n_workers=0"] * ("--set" in command))

    monkeypatch.setattr(demo, "run", run_short)
    monkeypatch.setattr(demo, "run_script", run_modules_alone)
    return tmp_path, commands


def run_modules_alone(*command, on_line):
    """In the place of run_script: modules run in processes of their own, and scripts within this process."""
    if command[0] == "-m":
        return run_script(*command, on_line=on_line)
    lines = run_here(*command).splitlines()
    for line in lines:
        on_line(f"{line}\n")
    return lines


@pytest.mark.parametrize("arguments, model, rooms", [([], "posenet", 1), (["--multiscene"], "ems-transposenet", 2)])
def test_the_demo_ends_with_its_table_and_pictures(short_demo, monkeypatch, capfd, arguments, model, rooms):
    folder, commands = short_demo
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    output = capfd.readouterr().out
    shown = [line for line in output.splitlines() if line.startswith("$ python ")]
    words = [shlex.split(line)[2:] for line in shown]
    assert [line[:len(command)] for line, command in zip(words, commands)] == list(map(list, commands))
    assert len(shown) == len(commands) == 2 + (1 + rooms) + (1 + rooms) + rooms
    assert "Pose error" not in output and "[Batch" not in output

    table = {name: f"{position} | {orientation}" for name, position, orientation in re.findall(
        r"^\| ([^|]+) \| (\d+\.\d+ m) \| [^|]*\| (\d+\.\d+ deg) \| [^|]*\| \d+\.\d+ m, \d+\.\d+ deg \|$", output,
        flags=re.MULTILINE)}
    assert list(table) == ["training mean", "training pose nearest to it", "APR", "PAE", "refined"]
    out = folder / "out" / f"demo-{model}"
    for name in ("APR", "PAE", "refined"):
        predictions = pd.concat([pd.read_csv(path) for path in sorted(out.glob(f"{name.lower()}_room-*.csv"))])
        expected = predictions[["position_error_m", "orientation_error_deg"]].median()
        assert table[name] == "{:.3f} m | {:.3f} deg".format(*expected)
    position = ["t1", "t2", "t3"]
    errors = []
    for scene in range(1, rooms + 1):
        train, truth = (pd.read_csv(out / "labels" / f"abs_7scenes_pose.csv_room-{scene}_{split}.csv")
                        for split in ("train", "test"))
        errors += list(((truth[position] - train[position].mean()) ** 2).sum(axis=1) ** 0.5)
    assert table["training mean"].startswith(f"{pd.Series(errors).median():.3f} m")
    pictures = re.findall(r"\S+\.png", output.split("\nPictures of the APR's training and of the refined poses:\n")[1])
    refined = [pd.read_csv(path) for path in out.glob("refined_room-*.csv")]
    assert len(pictures) == 1 + sum(5 if "novelty" in table and table["novelty"].notna().any() else 4
                                    for table in refined)
    assert rooms == 2 or "novelty" in refined[0]
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
