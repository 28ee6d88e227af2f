"""Frames decoded while PyTorch is loaded: the same pixels, as many as there are until they are asked for."""
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image
from test_image_cache import scene, spoil  # noqa: F401 (a fixture)

from datasets import ahead
from datasets.camera_poses import CameraPoseDataset


def ended(dataset):
    """The cache of a dataset's frames, once the other process has decoded all that it can."""
    end = ahead.decode_ahead(os.path.dirname(dataset.labels_file), dataset.labels_file)
    for process in multiprocessing.active_children():
        process.join(30)
    return end(dataset.paths)


@pytest.fixture
def dataset(scene, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ahead, "n_cores", lambda: 3)
    return CameraPoseDataset(*scene)


def test_frames_are_the_same_and_are_not_decoded_again(dataset):
    decoded = [np.asarray(dataset.read(i)) for i in range(len(dataset))]
    dataset.cache = ended(dataset)
    assert not multiprocessing.active_children()
    for path in dataset.paths:
        spoil(path)
    for i, pixels in enumerate(decoded):
        assert np.array_equal(np.asarray(dataset.frame(i)), pixels)


def test_a_frame_whose_file_has_changed_since_is_decoded_again(dataset):
    dataset.cache = ended(dataset)
    Image.new("RGB", (300, 256), "red").save(dataset.paths[2])
    assert dataset.frame(2).getpixel((0, 0)) == (255, 0, 0)


def test_frames_end_before_one_that_cannot_be_read_and_where_memory_does(dataset, monkeypatch):
    spoil(dataset.paths[4])
    cache = ended(dataset)
    assert [cache[i] is not None for i in range(6)] == [True] * 4 + [False] * 2
    monkeypatch.setattr(ahead, "MEMORY", 256 * (341 + 455) * 3)
    cache = ended(dataset)
    assert [cache[i] is not None for i in range(6)] == [True] * 2 + [False] * 4


def test_other_images_have_none(dataset, tmp_path, monkeypatch):
    end = ahead.decode_ahead(tmp_path, dataset.labels_file)
    assert end(dataset.paths[:3]) is None
    dataset.labels_file = str(tmp_path / "none.csv")
    assert ended(dataset) is None
    monkeypatch.setattr(ahead, "n_cores", lambda: 1)
    assert ended(dataset) is None
