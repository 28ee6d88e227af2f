"""Frames decoded once: the same pixels, no decoding afterwards, and files that others can share."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, write_labels, write_scene
from PIL import Image
from torchvision import transforms

from datasets.camera_poses import CameraPoseDataset
from datasets.loaders import train_batches
from datasets.resources import free_memory
from datasets.transforms import to_input, train_transform
from util.errors import UserError

# height, width, mode, extension: landscape, portrait, square, smaller than 256, odd sizes that the resize must round
KINDS = [(480, 640, "RGB", "png"), (270, 480, "RGB", "jpg"), (500, 333, "L", "png"), (256, 256, "RGBA", "png"),
         (40, 71, "RGB", "png"), (301, 299, "RGB", "jpg")]


@pytest.fixture
def scene(tmp_path):
    """A dataset of one frame per kind: its folder and label file."""
    random = np.random.default_rng(0)
    rows = []
    for i, (height, width, mode, extension) in enumerate(KINDS):
        name = f"a/{i}.{extension}"
        (tmp_path / "a").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        rows.append(f"a,train,s,{name},{i},2,3,1,0,0,0")
    return tmp_path, write_labels(tmp_path / "labels.csv", rows)


def spoil(path):
    """Overwrite a file so that neither its size nor its time tells: whoever decodes it now fails."""
    status = os.stat(path)
    Path(path).write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def images(dataset, n_workers=0, epoch=0):
    """The images of an epoch, in the dataset's order."""
    batches = list(train_batches(dataset, 4, n_workers, seed=0)(epoch))
    order = torch.cat([batch["row"] for batch in batches]).argsort()
    return torch.cat([batch["img"] for batch in batches])[order]


@pytest.mark.parametrize("transform", [None, train_transform])
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("in_file", [False, True])
def test_cached_frames_are_the_same_and_are_not_decoded_again(scene, transform, n_workers, in_file):
    dataset = CameraPoseDataset(*scene, transform and transform())
    decoded = images(dataset, epoch=3)
    cache_dir = scene[0] / "cache" if in_file else None
    dataset.cache_frames(cache_dir)
    for path in (scene[0] / "a").iterdir():
        spoil(path)
    assert torch.equal(images(dataset, n_workers, epoch=3), decoded)
    if in_file:
        later = CameraPoseDataset(*scene, transform and transform())
        later.cache_frames(cache_dir)
        assert torch.equal(images(later, n_workers, epoch=3), decoded)
        assert [path.suffix for path in cache_dir.iterdir()] == [".frames"]


def test_the_networks_get_what_the_published_transform_gives_them(scene):
    published = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                                    transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])])
    dataset = CameraPoseDataset(*scene)
    dataset.cache_frames()
    given = to_input(images(dataset))
    for i, (*_, extension) in enumerate(KINDS):
        assert torch.equal(given[i], published(Image.open(scene[0] / f"a/{i}.{extension}").convert("RGB")))


@pytest.mark.parametrize("in_file", [False, True])
def test_a_frame_whose_file_changed_is_decoded_again(scene, in_file):
    dataset = CameraPoseDataset(*scene)
    before = images(dataset)
    cache_dir = scene[0] / "cache" if in_file else None
    dataset.cache_frames(cache_dir)
    Image.fromarray(np.full((480, 640, 3), 77, np.uint8)).save(scene[0] / "a/0.png")
    Image.fromarray(np.full((300, 900, 3), 88, np.uint8)).save(scene[0] / "a/1.jpg")

    def changed(dataset):
        seen = images(dataset)
        return bool((seen[0] == 77).all() and (seen[1] == 88).all() and torch.equal(seen[2:], before[2:]))

    assert changed(dataset)
    if in_file:
        for i in range(2, len(KINDS)):
            spoil(scene[0] / f"a/{i}.{KINDS[i][3]}")  # the others are taken over, not decoded
        again = CameraPoseDataset(*scene)
        again.cache_frames(cache_dir)
        for name in ("a/0.png", "a/1.jpg"):
            spoil(scene[0] / name)
        assert changed(again) and len(list(cache_dir.iterdir())) == 1


def test_memory_stays_within_the_budget(scene, caplog):
    caplog.set_level("INFO")
    dataset = CameraPoseDataset(*scene)
    decoded = images(dataset)
    two = 3 * 256 * (341 + 455) / 1e9  # 640 x 480 and 480 x 270 resized
    for memory_gb, n_kept in ((two, 2), (two - 1e-9, 1), (0, 0)):
        dataset.cache_frames(memory_gb=memory_gb)
        assert f"Frames kept in memory: {n_kept} of 6" in caplog.text
        assert len(dataset.cache.pixels if dataset.cache else b"") <= memory_gb * 1e9
        assert torch.equal(images(dataset), decoded)
    assert 0 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_damaged_cache_is_made_anew(scene, caplog):
    caplog.set_level("INFO")
    dataset = CameraPoseDataset(*scene)
    decoded = images(dataset)
    dataset.cache_frames(scene[0] / "cache")
    (path,) = (scene[0] / "cache").iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1  # in the rows behind the pixels
    for damaged in (b"", whole[:1000], whole[:-1], whole[1:], bytes(flipped), whole[:-8] + b"nothing!"):
        path.write_bytes(damaged)
        caplog.clear()
        dataset.cache_frames(scene[0] / "cache")
        assert "is damaged" in caplog.text and torch.equal(images(dataset), decoded)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("in_file", [False, True])
def test_an_unreadable_frame_is_named_and_leaves_nothing(scene, in_file):
    spoil(scene[0] / "a/4.png")
    dataset = CameraPoseDataset(*scene)
    with pytest.raises(UserError, match=r"labels.csv: row 6: image .*a/4.png cannot be read"):
        dataset.cache_frames(scene[0] / "cache" if in_file else None)
    assert not in_file or not list((scene[0] / "cache").iterdir())


def test_two_runs_at_once_share_a_cache_folder(tmp_path):
    labels = write_labels(tmp_path / "labels.csv", write_scene(tmp_path, "attic", 12, "train"))
    command = [ROOT / "main.py", "posenet", "train", "none", tmp_path, labels, ROOT / "config.json",
               "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--set", "backbone_type=mobilenet",
               "hidden_dim=8", "n_epochs=1", "n_workers=0", "average_last=0"]
    small = [sys.executable, "-m", "bench.steady", "--size=64"]
    runs = [subprocess.Popen(list(map(str, small + command)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
            for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    third = run_here(*command)
    assert "Decoding" not in third
    files = {re.search(r"^Frames come from (.*)$", output, flags=re.MULTILINE)[1] for output in (*outputs, third)}
    assert len(files) == 1 and [str(path) for path in (tmp_path / "cache").iterdir()] == list(files)
