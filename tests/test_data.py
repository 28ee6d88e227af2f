"""Label files, images, and what is random in a dataset."""
import os
import shutil
import struct
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_labels, write_scene
from PIL import Image

from datasets.camera_poses import CameraPoseDataset
from datasets.images import read_image
from datasets.labels import read_labels
from datasets.loaders import test_batches as ordered_batches
from datasets.loaders import train_batches
from datasets.transforms import train_transform
from util.errors import UserError


def write_png_16_bit(path, pixels, colour_type):
    """A PNG file of 16-bit samples: H x W x C uint16 (Pillow writes none in colour)."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


COLOUR = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def test_every_kind_of_image_is_read_as_8_bit_rgb(tmp_path):
    grey = np.repeat(GREY[..., None], 3, axis=2)
    Image.fromarray(COLOUR).save(tmp_path / "rgb.png")
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack((COLOUR, GREY))).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack((GREY, GREY)), mode="LA").save(tmp_path / "grey_alpha.png")
    Image.fromarray(COLOUR).quantize(256).save(tmp_path / "palette.png")
    write_png_16_bit(tmp_path / "grey16.png", GREY[..., None].astype(np.uint16) * 257, colour_type=0)
    write_png_16_bit(tmp_path / "rgb16.png", COLOUR.astype(np.uint16) * 257, colour_type=2)
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name, expected in (("rgb.png", COLOUR), ("grey.png", grey), ("rgba.png", COLOUR), ("grey_alpha.png", grey),
                           ("grey16.png", grey), ("rgb16.png", COLOUR)):
        assert np.array_equal(read_image(tmp_path / name), expected), name
    for name in ("palette.png", "cmyk.jpg"):  # lossy in themselves
        assert np.abs(np.asarray(read_image(tmp_path / name)).astype(int) - COLOUR).mean() < 25, name


def test_a_16_bit_image_keeps_its_brightness_between_the_steps(tmp_path):
    values = np.array([[[0], [128], [129], [32768], [65535]]], dtype=np.uint16)
    write_png_16_bit(tmp_path / "grey16.png", values, colour_type=0)
    assert np.asarray(read_image(tmp_path / "grey16.png"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.fixture
def three_scenes(tmp_path):
    rows = [row for scene, n in (("b", 5), ("a", 2), ("c", 1)) for row in write_scene(tmp_path, scene, n, "train")]
    return tmp_path, write_labels(tmp_path / "labels.csv", rows)


def test_scene_indices_are_ranks_among_the_sorted_names(three_scenes):
    dataset = CameraPoseDataset(*three_scenes)
    assert dataset.scene_names == ["a", "b", "c"]
    assert [dataset[i]["scene"] for i in range(8)] == [1, 1, 1, 1, 1, 0, 0, 2]
    assert CameraPoseDataset(*three_scenes, scene_names=["x", "c", "b"]).scenes.tolist() == [2, 2, 2, 2, 2, -1, -1, 1]


def test_equalized_scenes_hold_every_frame_and_draw_what_the_scenes_lack(three_scenes):
    dataset = CameraPoseDataset(*three_scenes, equalize_scenes=True)
    assert len(dataset) == 3 * 5
    drawn = Counter()
    for epoch in range(60):
        poses = [tuple(dataset[epoch, position]["pose"].tolist()) for position in range(15)]
        assert poses[:8] == [tuple(pose) for pose in dataset.poses.tolist()]  # every frame once
        drawn.update(dataset[epoch, position]["scene"] for position in range(8, 15))
    # b lacks none; a lacks 3 of the 7 and c 4: of 420 draws 180 and 240, give or take (standard deviation 10)
    assert drawn[1] == 0 and abs(drawn[0] - 180) < 45


def test_augmentation_is_a_function_of_seed_epoch_and_row(three_scenes):
    def views(epoch, n_workers, seed=3):
        dataset = CameraPoseDataset(*three_scenes, train_transform(), seed=seed)
        return {tuple(pose.tolist()): img for batch in train_batches(dataset, 3, n_workers, seed)(epoch)
                for pose, img in zip(batch["pose"], batch["img"], strict=True)}
    torch.manual_seed(1)
    first = views(4, n_workers=0)
    torch.manual_seed(2)
    assert all(torch.equal(first[pose], img) for pose, img in views(4, n_workers=2).items())
    assert not any(torch.equal(first[pose], img) for pose, img in views(5, n_workers=0).items())
    assert not any(torch.equal(first[pose], img) for pose, img in views(4, n_workers=0, seed=4).items())


def test_epochs_are_shuffled_each_anew_and_tests_are_not(three_scenes):
    dataset = CameraPoseDataset(*three_scenes)
    batches = train_batches(dataset, 8, 0, seed=0)
    orders = [next(iter(batches(epoch)))["pose"] for epoch in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0].sort(dim=0).values, dataset.poses.sort(dim=0).values)
    assert torch.equal(torch.cat([batch["pose"] for batch in ordered_batches(dataset, 3, 0)]), dataset.poses)


def test_workers_hand_over_no_more_than_shared_memory_holds(three_scenes, monkeypatch):
    # Docker gives a container 64 MB; a worker that writes beyond is killed.
    dataset = CameraPoseDataset(*three_scenes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2 ** 20))
    for batch_size in (1, 32, 200, 1000):
        loader = ordered_batches(dataset, batch_size, 16)
        in_flight = loader.num_workers * (loader.prefetch_factor or 0) * batch_size * 224 * 224 * 3
        assert in_flight <= 32 * 2 ** 20
        assert loader.num_workers > 0 or batch_size > 100


ROW = "a,train,s,a/1.png,1,2,3,1,0,0,0"


def test_a_column_that_appears_twice_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4, t1\n" + ROW + ",9\n")
    with pytest.raises(UserError, match="labels.csv: column 't1' appears twice"):
        read_labels(tmp_path / "labels.csv")


def test_cells_are_stripped_and_columns_without_a_name_ignored(tmp_path):
    header = "scene, split,seq ,img_path,,t1,t2,t3,q1,q2,q3,q4,,"
    rows = ["a,train,s,a/1.png,x,1,2,3,1,0,0,0,,", " a , train,\ts, \"a/2.png\",y, 1 ,2\u00a0,3,1,0,0,0,z,,,",
            "a ,train,s,a/3.png,,1,2,3,1,0,0,0"]
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows]) + "\n")
    table = read_labels(tmp_path / "labels.csv")
    assert table["scene"].tolist() == ["a"] * 3 and table["split"].tolist() == ["train"] * 3
    assert table["seq"].tolist() == ["s"] * 3
    assert table["img_path"].tolist() == ["a/1.png", "a/2.png", "a/3.png"]
    assert table.loc[:, "t1":"q4"].to_numpy().tolist() == [[1, 2, 3, 1, 0, 0, 0]] * 3


@pytest.mark.parametrize("content, problem", [
    ("scene;split;seq;img_path;t1;t2;t3;q1;q2;q3;q4\na;train;s;a/1.png;1;2;3;1;0;0;0\n",
     "separated by commas, not by semicolons"),
    ("scene\tsplit\tseq\timg_path\tt1\tt2\n", "separated by commas, not by tabs"),
    ("scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q3\n" + ROW, "column 'q3' appears twice"),
    ("scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4\n" + ROW.replace("a/1", '"a/1') + "\n" + ROW,
     "not a readable label file: unexpected end"),
    ("scene,split,seq,img_path,t1,t2,t3,q1,q2,q3,q4\n" + ROW.replace("train", "tr\0in"),
     "row 2: has a zero byte in it"),
])
def test_a_table_of_another_kind_is_named(tmp_path, content, problem):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=f"labels.csv: .*{problem}"):
        read_labels(tmp_path / "labels.csv")


@pytest.mark.parametrize("rows, problem", [
    ([ROW.replace("a/1.png", "  ")], "row 2: img_path '' is empty"),
    ([], "no rows"),
    ([ROW, ROW.replace("2,3", "two,3")], "row 3: t2 'two' is not a finite number"),
    ([ROW, "", ROW.replace("2,3", "nan,3")], "row 4: t2 'nan' is not a finite number"),
    ([ROW.replace("3,1", "inf,1")], "row 2: t3 'inf' is not a finite number"),
    (["a,train,s,a/1.png,1,2,3,1,0"], "row 2: q3 '' is not a finite number"),
    ([ROW.replace("1,0,0,0", "0,0,0,0")], "row 2: q1, q2, q3 and q4 are 0: no orientation"),
    ([ROW.replace("a/1.png", "")], "row 2: img_path '' is empty"),
    ([ROW.replace("a/1.png", "../1.png")], "row 2: img_path '../1.png' leaves the dataset's folder"),
    ([ROW.replace("a/1.png", "/1.png")], "row 2: img_path '/1.png' leaves the dataset's folder"),
    ([ROW + ",9,9"], "row 2: 13 cells, but the header has 11"),
    ([ROW.replace("1,2,3", "1e39,2,3")], "row 2: t1 '1e39' is not a finite number"),
    ([ROW, ROW + ",9,9"], "row 3: 13 cells, but the header has 11"),
])
def test_a_bad_label_is_named_by_file_and_row(tmp_path, rows, problem):
    path = write_labels(tmp_path / "labels.csv", rows)
    with pytest.raises(UserError) as raised:
        read_labels(path)
    assert str(raised.value).startswith(f"{path}: ") and problem in str(raised.value)
