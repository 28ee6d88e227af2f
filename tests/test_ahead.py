"""Frames decoded while PyTorch is loaded: the same pixels, as many as there are until they are asked for."""
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_image_cache import scene, spoil  # noqa: F401 (a fixture)

from datasets import ahead
from datasets.camera_poses import CameraPoseDataset
from datasets.image_cache import read_frame
from util import signals


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


def test_a_frame_that_warns_is_left_to_whoever_needs_it_and_so_is_one_with_a_log_line(dataset, monkeypatch):
    image = Image.new("P", (300, 300))
    image.putpalette(range(256), "RGB")
    image.save(dataset.paths[3], "png", transparency=bytes(range(256)))  # Pillow warns of it
    with pytest.warns(UserWarning, match="Palette images"):
        dataset.read(3)
    assert [ended(dataset)[i] is not None for i in range(6)] == [True] * 3 + [False] * 3

    def read_and_log(path):
        if path == dataset.paths[1]:
            logging.getLogger("tifffile").warning("odd")
        return read_frame(path)

    monkeypatch.setattr(ahead, "read_frame", read_and_log)
    assert [ended(dataset)[i] is not None for i in range(6)] == [True] + [False] * 5


def test_a_pipe_of_labels_is_left_to_the_run(dataset, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert ahead.decode_ahead(tmp_path, tmp_path / "pipe")(dataset.paths) is None


def test_a_signal_waits_while_a_process_is_forked():
    inside = []
    with pytest.raises(signals.Stopped), signals.raised():
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            inside.append(True)
        inside.append("the signal is lost")
    assert inside == [True]


def test_decoding_ends_soon_after_the_process_that_began_it(dataset):
    begin = """if True:
        import os, sys, time
        from datasets import ahead
        read_frame = ahead.read_frame
        ahead.n_cores, ahead.read_frame = lambda: 2, lambda path: time.sleep(1) or read_frame(path)
        ahead.decode_ahead(*sys.argv[1:])
        time.sleep(0.5)
        print("begun", flush=True)
        os.kill(os.getpid(), 9)"""
    folder = os.path.dirname(dataset.labels_file)
    process = subprocess.Popen([sys.executable, "-c", begin, folder, dataset.labels_file], stdout=subprocess.PIPE,
                               cwd=ROOT, text=True)
    assert process.stdout.readline() == "begun\n"
    since = time.monotonic()
    assert process.stdout.read() == "" and process.wait() == -signal.SIGKILL  # all that hold the pipe have ended
    assert time.monotonic() - since < 4  # of six frames, a second each


def test_other_images_have_none(dataset, tmp_path, monkeypatch):
    end = ahead.decode_ahead(tmp_path, dataset.labels_file)
    assert end(dataset.paths[:3]) is None
    dataset.labels_file = str(tmp_path / "none.csv")
    assert ended(dataset) is None
    monkeypatch.setattr(ahead, "n_cores", lambda: 1)
    assert ended(dataset) is None
