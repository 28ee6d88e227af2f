"""Label files from the official download of 7Scenes, and from rooms in the same layout."""
import shutil

import numpy as np
import pytest
from conftest import MINI, needs_real_frames, run_script
from prepare_layouts import (
    TURN,
    call_well,
    edit,
    empty,
    empty_dataset,
    ends_in_one_clear_line,
    error_of,
    pose_of,
    read_rows,
    remove,
    truncate,
    write_7scenes,
    write_archive,
)

from datasets import prepare_7scenes
from datasets.descriptions import describe
from util.errors import first_five


@needs_real_frames
def test_real_frames_get_the_published_labels(tmp_path):
    for path in MINI.glob("redkitchen/**/*.*"):
        copy = tmp_path / path.relative_to(MINI).with_name(path.name.replace(".jpg", ".png"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    for split in ("train", "test"):
        rows = read_rows(tmp_path / f"abs_7scenes_pose.csv_redkitchen_{split}.csv")
        expected = read_rows(MINI / f"expected_{split}.csv")
        assert [row[:4] for row in rows] == [row[:4] for row in expected]
        difference = np.abs([pose_of(a) - pose_of(b) for a, b in zip(rows, expected, strict=True)])
        assert difference[:, :3].max() < 1e-6 and difference[:, 3:].max() < 1e-5


def test_7scenes_label_files(tmp_path):
    for scene in ("office", "chess", "attic"):
        write_7scenes(tmp_path, scene)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".trash" / "seq-01").mkdir(parents=True)
    output = call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    names = {f"abs_7scenes_pose.csv_{scene}_{split}.csv"
             for scene in ("office", "chess", "attic") for split in ("train", "test")}
    described = {f"abs_7scenes_pose.csv_attic_{split}.json" for split in ("train", "test")}  # no scene of the papers
    assert {path.name for path in (tmp_path / "labels").iterdir()} == {*names, *described, "7scenes_all_scenes.csv"}
    assert {describe(tmp_path / "labels" / name)["convention"] for name in described} == {"7Scenes"}
    for row, x in zip(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv"), (20, 21, 22), strict=True):
        assert row[:4] == ["chess", "test", "seq-02", f"chess/seq-02/frame-{x - 20:06d}.color.png"]
        np.testing.assert_allclose(pose_of(row), [x, 2, 3, 0.5 ** 0.5, 0, 0, 0.5 ** 0.5], atol=1e-9)
    together = read_rows(tmp_path / "labels/7scenes_all_scenes.csv")
    assert [row[0] for row in together] == ["chess"] * 3 + ["office"] * 3  # no other than the official ones
    assert {row[1] for row in together} == {"train"}
    assert "7scenes_all_scenes.csv has chess, office, not chess, fire" in output

    # A scene asked for by name leaves the file of all scenes alone.
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--scenes", "attic")
    assert read_rows(tmp_path / "labels/7scenes_all_scenes.csv") == together


def test_scenes_of_ones_own_make_the_file_of_all_scenes(tmp_path):
    for scene in ("cellar", "attic", "cellar.part"):  # the last: what is being written, or was broken off
        write_7scenes(tmp_path, scene)
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    assert [row[0] for row in read_rows(tmp_path / "7scenes_all_scenes.csv")] == ["attic"] * 3 + ["cellar"] * 3


def test_jpg_frames_do_where_there_are_no_png_ones(tmp_path):
    for path in write_7scenes(tmp_path).glob("seq-01/*.color.png"):
        path.rename(path.with_suffix(".jpg"))
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    assert read_rows(tmp_path / "7scenes_all_scenes.csv")[0][3] == "chess/seq-01/frame-000000.color.jpg"


def test_png_and_jpg_frames_in_one_sequence_are_all_read(tmp_path):
    sequence = write_7scenes(tmp_path) / "seq-01"
    (sequence / "frame-000001.color.png").rename(sequence / "frame-000001.color.jpg")
    (sequence / "frame-000002.color.jpg").write_bytes(b"")
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path)
    names = ["frame-000000.color.png", "frame-000001.color.jpg", "frame-000002.color.png"]
    rows = read_rows(tmp_path / "7scenes_all_scenes.csv")
    assert [row[3] for row in rows] == [f"chess/seq-01/{name}" for name in names]
    (sequence / "frame-000001.pose.txt").unlink()
    assert "frame-000001.color.jpg: an image without" in error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path)


NOT_FINITE = {"nan": "nan nan nan nan\n" * 4, "infinite": "-inf -inf -inf -inf\n" * 4, "huge": TURN.format(x="1e300"),
              "old Windows": "-1.#IND00 1.#INF 1.#QNAN0 -1.#J\n" * 3 + "0 0 0 1\n", "Windows": "-nan(ind) 0 0 0\n" * 4}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_frames_whose_pose_is_not_finite_are_left_out_if_asked(kind, tmp_path):
    attic, chess = write_7scenes(tmp_path, "attic"), write_7scenes(tmp_path, "chess")
    bad = chess / "seq-01/frame-000001.pose.txt"
    bad.write_text(NOT_FINITE[kind])
    arguments = [prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels"]
    error = error_of(*arguments)
    assert f"{bad}: " in error and " in it; a pose must be finite numbers; --skip_bad_poses leaves out" in error
    assert not (tmp_path / "labels").exists()
    lines = call_well(*arguments, "--skip_bad_poses").splitlines()
    assert f"{chess}: 1 frames left out, whose pose is not finite: seq-01/frame-000001" in lines
    assert f"{attic}: 0 frames left out, whose pose is not finite" in lines
    rows = read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_train.csv")
    assert [(row[3], float(row[4])) for row in rows] == [("chess/seq-01/frame-000000.color.png", 10),
                                                         ("chess/seq-01/frame-000002.color.png", 12)]
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv")) == 3


def write_frames(sequence, n, pose):
    for i in range(3, n):
        (sequence / f"frame-{i:06d}.color.png").write_bytes(b"")
        (sequence / f"frame-{i:06d}.pose.txt").write_text(pose)


def test_what_is_left_out_is_counted_and_five_are_named(tmp_path):
    chess = write_7scenes(tmp_path)
    write_frames(chess / "seq-01", 10, NOT_FINITE["nan"])
    output = call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    names = ", ".join(f"seq-01/frame-{i:06d}" for i in range(3, 8))
    assert f"{chess}: 7 frames left out, whose pose is not finite: {names}, ...\n" in output


@pytest.mark.parametrize("case, words", (
    ("all", "chess/seq-01: no frame is left; none of its 3 poses is finite"),
    ("three rows", "frame-000001.pose.txt: 3 rows with 12 numbers"),
    ("a word", "frame-000001.pose.txt: not a matrix of numbers"),
    ("mirrored", "frame-000001.pose.txt: no rotation"),
))
def test_poses_that_are_bad_in_another_way_stay_errors(case, words, tmp_path):
    sequence = write_7scenes(tmp_path) / "seq-01"
    nan = NOT_FINITE["nan"]
    text = {"all": nan, "three rows": nan[:48], "a word": nan.replace("nan", "left", 1),
            "mirrored": TURN.format(x=1).replace("-1", "1")}[case]
    for i in range(3) if case == "all" else [1]:
        (sequence / f"frame-{i:06d}.pose.txt").write_text(text)
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    assert words in error and "--skip_bad_poses" not in error and not (tmp_path / "labels").exists()


POSE = "seq-02/frame-000001.pose.txt"
def cut_archive(share):
    def break_it(scene):
        path = write_archive(scene.parent / "fire.zip", scene)
        truncate(path, int(share * path.stat().st_size))
    return break_it


SEVEN_SCENES_MISTAKES = {
    "no split file": (remove("TestSplit.txt"), "chess/TestSplit.txt: cannot be read: No such file"),
    "empty split file": (edit("TestSplit.txt", "sequence2", ""), "chess/TestSplit.txt: names no sequence"),
    "split of something else": (edit("TestSplit.txt", "sequence2", "frames 2"),
                                "TestSplit.txt: line 1: 'frames 2' is no sequence"),
    "sequence not there": (edit("TestSplit.txt", "sequence2", "sequence2\nsequence 7"),
                           "TestSplit.txt: line 2: no folder "),
    "sequence in both splits": (edit("TestSplit.txt", "sequence2", "sequence1"),
                                "TestSplit.txt: line 1: seq-01 is named in "),
    "three rows": (edit(POSE, "0 0 0 1\n", ""), f"{POSE}: 3 rows"),
    "five numbers in a row": (edit(POSE, "1 0 0 2", "1 0 0 2 1"), f"{POSE}: 4 rows with 17 numbers"),
    "empty pose": (lambda scene: (scene / POSE).write_text(""), f"{POSE}: 0 rows"),
    "NaN": (edit(POSE, "-1", "nan"), f"{POSE}: nan in it"),
    "infinite position": (edit(POSE, " 2\n", " -inf\n"), f"{POSE}: -inf in it"),
    "a word": (edit(POSE, "-1", "left"), f"{POSE}: not a matrix of numbers"),
    "a number of Python's": (edit(POSE, "-1", "-1_0"), f"{POSE}: not a matrix of numbers: could not convert"),
    "mirrored": (edit(POSE, "-1", "1"), f"{POSE}: no rotation and translation"),
    "scaled": (edit(POSE, "-1", "-1.2"), f"{POSE}: no rotation and translation"),
    "transposed": (lambda scene: (scene / POSE).write_text("0 1 0 0\n-1 0 0 0\n0 0 1 0\n4 2 3 1\n"),
                   f"{POSE}: no rotation"),
    "binary pose": (lambda scene: (scene / POSE).write_bytes(b"\xff\xfe\x00"), f"{POSE}: not a text file"),
    "image without pose": (remove(POSE), "frame-000001.color.png: an image without its pose, frame-000001.pose.txt"),
    "pose without image": (remove("seq-02/frame-000001.color.png"), f"{POSE}: a pose without its image"),
    "empty sequence": (empty("seq-02"), "chess/seq-02: no frame-"),
    "empty dataset": (empty_dataset, "holds no scene"),
    "no dataset": (lambda scene: shutil.rmtree(scene.parent), "no such folder"),
    "truncated archive of a sequence": (lambda scene: (scene / "seq-03.zip").write_bytes(b"PK\3\4 and no more"),
                                        "chess/seq-03.zip: a truncated or damaged archive"),
    **{f"archive of a scene cut off at {share}": (cut_archive(share), "fire.zip: a truncated or damaged archive")
       for share in (0.3, 0.5, 0.75, 0.99, 0.999)},
    "archive of another scene": (lambda scene: write_archive(scene.parent / "fire.zip", scene),
                                 "fire.zip: holds no folder fire"),
}


@pytest.mark.parametrize("case", SEVEN_SCENES_MISTAKES)
def test_a_mistake_ends_in_one_clear_line_and_no_label_file(case, tmp_path):
    ends_in_one_clear_line(prepare_7scenes, write_7scenes, "chess", SEVEN_SCENES_MISTAKES[case], tmp_path)


def test_first_five():
    assert first_five(["a"]) == "a" and first_five(["a", "b"]) == "2 problems: a; b"
    assert first_five(list("abcde")) == "5 problems: a; b; c; d; e"
    assert first_five(list("abcdefgh")) == "8 problems: a; b; c; d; e; and 3 more"


def test_several_bad_poses_of_a_scene_are_counted(tmp_path):
    chess = write_7scenes(tmp_path)
    write_frames(chess / "seq-01", 8, NOT_FINITE["nan"])
    (chess / "seq-02/frame-000001.pose.txt").unlink()
    (chess / "seq-02/frame-000002.color.png").unlink()
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert f"error: 7 problems: {chess}/seq-01/frame-000003.pose.txt: nan in it; a pose must be finite" in error
    assert "frame-000007" in error and "seq-02" not in error
    assert error.endswith("; and 2 more; --skip_bad_poses leaves out the frames whose pose is not finite\n")
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels", "--skip_bad_poses")
    assert "error: 2 problems: " in error and "frame-000002.pose.txt: a pose without its image" in error
    assert "frame-000001.color.png: an image without its pose" in error and "--skip" not in error
    assert not (tmp_path / "labels").exists()


def test_a_process_ends_with_2_and_one_line(tmp_path):
    scene = write_7scenes(tmp_path)
    edit(POSE, "-1", "nan")(scene)
    process = run_script("-m", "datasets.prepare_7scenes", tmp_path, "--labels_path", tmp_path / "labels")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and POSE in process.stderr
    assert process.stderr.startswith("prepare_7scenes.py: error: ")
