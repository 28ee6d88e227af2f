"""Label files from the official download of Cambridge Landmarks."""
import pytest
from conftest import run_module_here
from prepare_layouts import (
    call_well,
    edit,
    empty_dataset,
    ends_in_one_clear_line,
    error_of,
    read_rows,
    remove,
    write_cambridge,
)

from datasets import prepare_cambridge
from datasets.descriptions import describe, read_convention
from datasets.labels import read_labels


def test_cambridge_has_no_poses_to_skip(tmp_path):
    status, _, errors = run_module_here(prepare_cambridge, tmp_path, "--skip_bad_poses")
    assert status == 2 and "unrecognized arguments: --skip_bad_poses" in errors


def test_a_scene_of_ones_own_under_a_name_of_the_other_dataset_keeps_the_layouts_convention(tmp_path):
    write_cambridge(tmp_path, "office")
    call_well(prepare_cambridge, tmp_path, "--labels_path", tmp_path, "--scenes", "office")
    for split in ("train", "test"):
        path = tmp_path / f"abs_cambridge_pose_sorted.csv_office_{split}.csv"
        assert read_convention(path, ["office"]) == "CambridgeLandmarks"
        path.with_suffix(".json").write_text('{"unit": "model units", "convention": "colmap"}')  # of an earlier file
    call_well(prepare_cambridge, tmp_path, "--labels_path", tmp_path, "--scenes", "office")
    assert describe(path) == {"unit": "m", "convention": "CambridgeLandmarks"}


def test_cambridge_label_files_copy_the_numbers_in_the_frames_order(tmp_path):
    lines = {scene: write_cambridge(tmp_path, scene) for scene in ("ShopFacade", "GreatCourt", "KingsCollege")}
    (tmp_path / "ShopFacade/seq2/frame00009.png").write_bytes(b"")
    output = call_well(prepare_cambridge, tmp_path, "--labels_path", tmp_path)
    for scene in lines:
        for split in ("train", "test"):
            rows = read_rows(tmp_path / f"abs_cambridge_pose_sorted.csv_{scene}_{split}.csv")
            order = ["seq2", "seq10"] if split == "train" else ["seq3"]
            frames = [[seq, f"{scene}/{seq}/frame{i:05d}.png"] for seq in order for i in (1, 2)]
            assert [row[2:4] for row in rows] == frames
            assert {" ".join([row[3].removeprefix(f"{scene}/"), *row[4:]]) for row in rows} == set(lines[scene][split])
            assert {(row[0], row[1]) for row in rows} == {(scene, split)}
    assert len(read_labels(tmp_path / "cambridge_four_scenes.csv")) == 8
    together = read_rows(tmp_path / "cambridge_four_scenes.csv")
    assert [row[0] for row in together] == ["KingsCollege"] * 4 + ["ShopFacade"] * 4
    assert {row[1] for row in together} == {"train"}
    assert "ShopFacade: 1 images without a pose" in output and "seq2/frame00009.png" in output
    assert "cambridge_four_scenes.csv has KingsCollege, ShopFacade, not" in output


CAMBRIDGE_MISTAKES = {
    "no split file": (remove("dataset_train.txt"), "ShopFacade/dataset_train.txt: cannot be read: No such file"),
    "image not there": (remove("seq3/frame00001.png"), "dataset_test.txt: line 5: image "),
    "image in both splits": (edit("dataset_test.txt", "seq3/frame00001.png", "seq2/frame00001.png"),
                             "dataset_test.txt: image seq2/frame00001.png is listed in "),
    "image outside": (edit("dataset_test.txt", "seq3/", "../seq3/"), "dataset_test.txt: line 4: image ../seq3"),
    "seven fields": (edit("dataset_test.txt", "seq3/frame00002.png", ""), "dataset_test.txt: line 4: '"),
    "nine fields": (edit("dataset_test.txt", "frame00002.png", "frame00002.png 1"), "dataset_test.txt: line 4: '"),
    "NaN": (edit("dataset_test.txt", "frame00001.png ", "frame00001.png nan"), "dataset_test.txt: line 5: '"),
    "a number of Python's": (edit("dataset_test.txt", "frame00001.png ", "frame00001.png 1_"),
                             "dataset_test.txt: line 5: '"),
    "no header": (edit("dataset_test.txt", "Visual Landmark Dataset V1\n", ""),
                  "dataset_test.txt: line 3: a frame among the 3"),
    "no frames": (lambda scene: (scene / "dataset_test.txt").write_text("a\nb\n\n"),
                  "dataset_test.txt: lists no frame"),
    "empty dataset": (empty_dataset, "holds no scene"),
}


@pytest.mark.parametrize("case", CAMBRIDGE_MISTAKES)
def test_a_mistake_ends_in_one_clear_line_and_no_label_file(case, tmp_path):
    ends_in_one_clear_line(prepare_cambridge, write_cambridge, "ShopFacade", CAMBRIDGE_MISTAKES[case], tmp_path)


def test_several_bad_lines_of_a_split_file_are_counted(tmp_path):
    write_cambridge(tmp_path)
    path = tmp_path / "ShopFacade/dataset_train.txt"
    text = path.read_text()
    path.write_text(text.replace("seq10/frame00001", "/seq10/frame00001").replace(".png ", ".jpg ") + "# end\n" * 3)
    error = error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels")
    assert f"error: {path}: 7 problems: line 4: image {path.parent}/seq10/frame00002.jpg does not exist; " in error
    assert "line 5: image /seq10/frame00001.jpg is outside" in error and "line 8: '# end' is no frame" in error
    assert "line 9" not in error and error.endswith("; and 2 more\n")
    path.write_text(text + "".join(f"{line}\n" for line in text.splitlines()[3:5]))
    error = error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels")
    assert "error: 2 problems: " in error and error.count("already; list each once") == 2
    assert not (tmp_path / "labels").exists()


def test_arguments_that_do_not_go_together(tmp_path):
    write_cambridge(tmp_path)
    for more, words in ((["--url", "http://localhost"], "--url is for --download"),
                        (["--download", "--url", "ftp://localhost"], "must begin with http://"),
                        (["--download", "--scenes", "Attic"],
                         "--scenes Attic: no scene to download; choose from Kings"),
                        (["--scenes", "../ShopFacade"], "give a folder's name, not a path"),
                        (["--scenes", "ShopFacade", "Street"], "--scenes Street: no such folder")):
        assert words in error_of(prepare_cambridge, tmp_path, "--labels_path", tmp_path / "labels", *more)
    assert not (tmp_path / "labels").exists()
