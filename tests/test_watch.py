"""Image lists and watched folders: images have the same poses however they come to predict."""
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fails_here, run_here
from test_short import POSE
from walks import fails, pae_of, predict, write_walk


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def expected(walk):
    """The poses of the walk's frames, predicted as images: N x 7."""
    return predict(walk, walk / "photos")[1][POSE].to_numpy()


def test_a_list_of_images_comes_from_standard_input(walk, expected, tmp_path, monkeypatch):
    def listed(*names):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(names).encode())))

    names = [f"{walk}/photos/{i:06d}.png" for i in (7, 2, 11)]
    listed(*names, "")
    _, table = predict(walk, "-")
    assert list(table["img_path"]) == ["000007.png", "000002.png", "000011.png"]
    assert np.allclose(table[POSE], expected[[7, 2, 11]], atol=1e-5)
    listed(names[0], "gone.png", names[1])
    status, line = fails(walk, "-")
    assert status == 2 and "standard input: line 2: no file 'gone.png'" in line
    listed("")
    assert "standard input: no image; give paths of images" in fails(walk, "-")[1]
    # The long form, as a user runs it.
    process = subprocess.run(
        [sys.executable, ROOT / "main.py", "posenet", "predict", "none", "-", "-", ROOT / "config.json",
         "--checkpoint_path", walk / "apr.pth", "--predictions_path", tmp_path / "long.csv", "--output_dir",
         tmp_path, "--set", "backbone_type=mobilenet", "hidden_dim=16", "n_workers=0"],
        input="\n".join(names), text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert np.allclose(pd.read_csv(tmp_path / "long.csv")[POSE], table[POSE], atol=1e-4)


def until(condition, seconds=60):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


def test_watch_predicts_what_arrives_until_it_is_stopped(walk, expected, tmp_path):
    camera, table, photos = tmp_path / "camera", tmp_path / "live.csv", sorted((walk / "photos").iterdir())
    (camera / "left").mkdir(parents=True)
    for i in (0, 1):
        shutil.copy(photos[i], camera)
    with open(table, "w") as stdout:
        process = subprocess.Popen(
            [sys.executable, ROOT / "main.py", "predict", camera, "--checkpoint_path", walk / "apr.pth", "--watch",
             "--predictions_path", "-", "--output_dir", tmp_path / "out"],
            stdout=stdout, stderr=subprocess.PIPE, text=True)
    try:
        def names():
            return [line.split(",")[0] for line in table.read_text().splitlines()[1:]]

        until(lambda: len(names()) == 2)
        for i, target in ((2, "000002.png"), (3, "left/000003.png")):  # one by one
            shutil.copy(photos[i], camera / target)
            until(lambda: len(names()) == i + 1)  # noqa: B023 (called at once)
        # A slow copy: half of the file for longer than it takes to give up, then the rest.
        content = photos[4].read_bytes()
        (camera / "000004.png").write_bytes(content[:len(content) // 2])
        shutil.copy(photos[5], camera)
        (camera / "broken.jpg").write_bytes(b"\xff\xd8no image")
        [log] = (tmp_path / "out").glob("*.log")
        until(lambda: all(f"{name} cannot be read" in log.read_text() for name in ("000004.png", "broken.jpg")))
        (camera / "000004.png").write_bytes(content)
        until(lambda: "000004.png" in names())
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in said
    found = pd.read_csv(table)
    order = ["000000.png", "000001.png", "000002.png", "left/000003.png", "000005.png", "000004.png"]
    assert list(found["img_path"]) == order and list(found.columns) == ["img_path", *POSE]
    assert np.allclose(found[POSE], expected[[0, 1, 2, 3, 5, 4]], atol=1e-4)
    assert f"Left out until it changes: image {camera}/broken.jpg cannot be read" in said
    assert f"Watched {camera}: 6 images predicted, 1 not readable\n" in said


def watched(camera, act, *arguments):
    """Watch a folder within this process while a thread acts, which then stops it; returns what is printed."""
    ended = threading.Event()

    def then_stop():
        try:
            act()
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=then_stop)
    thread.start()
    try:
        return run_here("main.py", "predict", camera, "--watch", "--output_dir", camera.parent / "out", *arguments)
    finally:
        ended.set()
        thread.join()


def test_watch_continues_a_file_with_novelty_and_refuses_another(walk, tmp_path):
    torch.save(pae_of(walk / "apr.pth").state_dict(), tmp_path / "pae.pth")
    camera, table = tmp_path / "camera", tmp_path / "live.csv"
    shutil.copytree(walk / "photos", camera)
    options = ["--encoder_checkpoint_path", tmp_path / "pae.pth", "--max_novelty", "1e9"]
    _, whole = predict(walk, camera, *options)
    for path in sorted(camera.iterdir())[3:]:
        path.unlink()

    def rows(n):
        return lambda: until(lambda: table.exists() and len(table.read_text().splitlines()) == n + 1)

    options += ["--checkpoint_path", walk / "apr.pth", "--predictions_path", table]
    watched(camera, rows(3), *options)
    shutil.copy(walk / "photos/000003.png", camera)
    output = watched(camera, rows(4), *options)
    assert "has the poses of 3 images already, which are left out" in output and ": 1 images predicted" in output
    pd.testing.assert_frame_equal(pd.read_csv(table), whole[:4], atol=1e-4, rtol=1e-3)
    before = table.read_text()
    status, line = fails_here("main.py", "predict", camera, "--watch", "--output_dir", tmp_path, "--checkpoint_path",
                              walk / "apr.pth", "--predictions_path", table)
    assert status == 2 and "live.csv: has other columns than img_path,t1," in line and table.read_text() == before
