"""Videos: the frames of a rendered walk have the same poses in a video as in images."""
import os
import shutil
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MINI, PUBLISHED, needs_real_frames, run_module_here
from PIL import Image
from test_short import POSE
from walks import HEIGHT, WIDTH, N, fails, predict, write_walk

from datasets import export_poses, prepare_photos
from datasets.unlabelled import Images
from datasets.video import VideoFrames
from util.metrics import pose_err

RATE = 8  # frames per second
LOSSLESS = {".mp4": ("libx264rgb", "rgb24", {"crf": "0"}), ".mov": ("libx264rgb", "rgb24", {"crf": "0"}),
            ".mkv": ("ffv1", "bgr0", {}), ".webm": ("libvpx-vp9", "gbrp", {"lossless": "1"}),
            ".avi": ("ffv1", "bgr0", {})}
# What a player shows of stored pixels, by the angle that it turns them counterclockwise, and the display matrix.
SHOWN = {90: (lambda p: np.rot90(p, 1), (0, -1, 1, 0)), 180: (lambda p: np.rot90(p, 2), (-1, 0, 0, -1)),
         270: (lambda p: np.rot90(p, 3), (0, 1, -1, 0)), "mirrored": (lambda p: p[:, ::-1], (-1, 0, 0, 1))}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture(scope="module")
def expected(walk):
    """The poses of the walk's frames, predicted as images: N x 7."""
    return predict(walk, walk / "photos")[1][POSE].to_numpy()


def frames_of(walk):
    return [np.asarray(Image.open(path)) for path in sorted((walk / "photos").iterdir())]


def write_video(path, frames, codec=None, times=None, **container):
    """Write frames as a video, losslessly without a codec. times: milliseconds of each, or None for RATE per second."""
    codec, pixels, options = codec or LOSSLESS[path.suffix]
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times is not None:
                picture.pts = times[i]
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def rotate(path, matrix):
    """Write a matrix (a, b, c, d) into the track header of an mp4 file, as a phone does that is held sideways."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # ISO 14496-12, 8.3.2: a version 0 header has 40 bytes before the matrix
    a, b, c, d = (65536 * value for value in matrix)
    content[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("extension", LOSSLESS)
def test_a_video_gives_the_poses_of_its_frames(walk, expected, tmp_path, extension):
    path = write_video(tmp_path / f"walk one{extension}", frames_of(walk))
    _, table = predict(walk, path)
    assert list(table["img_path"]) == [f"walk one{extension}#{i:06d}" for i in range(N)]
    assert np.allclose(table["time_s"], np.arange(N) / RATE, atol=1e-3)
    assert np.allclose(table[POSE], expected, atol=1e-4)
    output, table = predict(walk, path, "--every", 5)
    assert "Rotation" not in output
    assert list(table["img_path"]) == [f"walk one{extension}#{i:06d}" for i in range(0, N, 5)]
    assert np.allclose(table["time_s"], np.arange(0, N, 5) / RATE, atol=1e-3)
    assert np.allclose(table[POSE], expected[::5], atol=1e-4)


def test_compression_as_phones_have_it_changes_a_networks_input_little(walk, tmp_path):
    path = write_video(tmp_path / "walk.mp4", frames_of(walk), ("libx264", "yuv420p", {"crf": "12"}))
    images = Images(str(walk / "photos"))
    expected = np.stack([images[0, i]["img"] for i in range(N)]).astype(int)
    found = np.concatenate([batch["img"] for batch in VideoFrames(str(path)).batches(5)])
    assert found.shape == expected.shape
    differences = np.array([[np.abs(a - b).mean() for b in expected] for a in found])  # levels of 255
    assert np.diag(differences).max() < 8 and differences[~np.eye(N, dtype=bool)].min() > 16


@pytest.mark.parametrize("angle", SHOWN)
def test_turned_videos_are_shown_upright_unless_asked_not_to(walk, expected, tmp_path, angle):
    shown, matrix = SHOWN[angle]
    turns_back = shown if angle == "mirrored" else SHOWN.get(360 - angle, SHOWN[180])[0]
    stored = [turns_back(frame) for frame in frames_of(walk)[:6]]
    path = write_video(tmp_path / "walk.mp4", stored)
    _, plain = predict(walk, path)
    rotate(path, matrix)
    output, table = predict(walk, path)
    assert f"Rotation: {path} has one, and its frames are turned upright (--as_stored leaves them" in output
    assert np.allclose(table[POSE], expected[:6], atol=1e-4)
    output, table = predict(walk, path, "--as_stored")
    assert f"Rotation: {path} has one, and its frames are left as stored (--as_stored)\n" in output
    pd.testing.assert_frame_equal(table, plain)
    assert not np.allclose(table[POSE], expected[:6], atol=1e-2)


@needs_real_frames
@pytest.mark.parametrize("angle", [None, 90])
def test_a_compressed_video_of_real_frames_moves_the_published_aprs_poses_less_than_their_errors(tmp_path, angle):
    """Of H.264 as phones have it: medians of 2 cm and 0.9 degrees, where the errors' are 14 cm and 4.7 degrees.

    Single frames move by up to 6 degrees, more or less with the number of threads that x264 takes by default (the
    cores), which changes the video: one thread here, and nine frames of ten are asked to move less than the errors.
    """
    shutil.copy(PUBLISHED / "posenet_mobilenet_apr.pth", tmp_path / "apr.pth")
    (tmp_path / "photos").mkdir()
    for path in sorted(MINI.glob("redkitchen/seq-02/*.jpg"))[:40]:
        shutil.copy(path, tmp_path / "photos")
    expected = predict(tmp_path, tmp_path / "photos")[1]
    frames = frames_of(tmp_path)
    if angle is not None:
        frames = [SHOWN[360 - angle][0](frame) for frame in frames]
    path = write_video(tmp_path / "walk.mp4", frames, ("libx264", "yuv420p", {"crf": "18", "threads": "1"}))
    if angle is not None:
        rotate(path, SHOWN[angle][1])
    table = predict(tmp_path, path)[1]
    metres, degrees = pose_err(*(torch.tensor(poses[POSE].to_numpy()) for poses in (table, expected)))
    assert metres.median() < 0.04 and metres.quantile(0.9) < 0.14
    assert degrees.median() < 1.5 and degrees.quantile(0.9) < 4.7
    far = torch.tensor(expected[POSE].to_numpy()).roll(20, dims=0)  # other frames' poses differ more
    assert pose_err(torch.tensor(table[POSE].to_numpy()), far)[0].median() > 3 * metres.median()


def test_times_are_the_videos_own_and_become_those_of_a_trajectory(walk, expected, tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(20, 400, N)).tolist()  # as phones in the dark: none is regular
    path = write_video(tmp_path / "walk.mkv", frames_of(walk), times=[t - times[0] for t in times])
    _, table = predict(walk, path)
    seconds = (np.array(times) - times[0]) / 1000
    assert np.allclose(table["time_s"], seconds, atol=1e-3) and np.allclose(table[POSE], expected, atol=1e-4)
    arguments = [walk / "poses.csv", tmp_path / "walk.tum", "--format", "tum", "--convention", "7Scenes"]
    assert run_module_here(export_poses, *arguments)[0] == 0
    trajectory = np.loadtxt(tmp_path / "walk.tum")
    assert np.allclose(trajectory[:, 0], seconds, atol=1e-3) and np.allclose(trajectory[:, 1:4], expected[:, :3])
    # Where frames are counted by another file, the count is the time.
    assert run_module_here(export_poses, *arguments, "--frames", walk / "poses.csv")[0] == 0
    assert np.array_equal(np.loadtxt(tmp_path / "walk.tum")[:, 0], np.arange(N))
    table["time_s"] = table["time_s"].astype(str)
    table.loc[3, "time_s"] = "soon"
    table.to_csv(walk / "poses.csv", index=False)
    status, _, errors = run_module_here(export_poses, *arguments)
    assert status == 2 and "row 5: time_s 'soon' is not a finite number" in errors


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def damage(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 4000] = np.random.default_rng(0).bytes(4000)
    path.write_bytes(content)


@pytest.mark.parametrize("extension, harm", [(".mp4", cut_off), (".mp4", damage), (".mkv", cut_off), (".avi", cut_off)])
def test_the_frames_before_a_videos_damage_are_predicted(walk, expected, tmp_path, extension, harm):
    codec = ("libx264", "yuv420p", {"crf": "1", "g": "6"}) if extension == ".mp4" else None
    path = write_video(tmp_path / f"walk{extension}", frames_of(walk), codec, movflags="faststart")
    _, whole = predict(walk, path)
    harm(path)
    status, line = fails(walk, path)
    found = pd.read_csv(walk / "poses.csv")
    n = len(found)
    assert status == 2 and 3 <= n < N and line.endswith("poses.csv has the poses of the frames before it")
    assert f"error: video {path} cannot be read from frame {n} on, at {n / RATE:.1f}" in line
    assert np.allclose(found[POSE], whole[POSE][:n], atol=1e-5)


def test_what_is_no_video_is_said_in_one_line(walk, tmp_path, monkeypatch):
    good = write_video(tmp_path / "good.mp4", frames_of(walk)[:2])
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "empty.mkv").touch()
    cut_off(write_video(tmp_path / "no index.mov", frames_of(walk)))
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux([*stream.encode(sound), *stream.encode()])
    for name, words in (("text.mp4", "text.mp4: cannot be read as a video"),
                        ("empty.mkv", "empty.mkv: cannot be read as a video"),
                        ("no index.mov", "it is no video, or was cut off while it was recorded"),
                        ("sound.mp4", "sound.mp4: holds no video, only audio"),
                        ("none.avi", "none.avi: no such video"), ("*.mp4", "one at a time")):
        status, line = fails(walk, tmp_path / name)
        assert status == 2 and words in line and not (walk / "poses.csv").exists()
    for images, more, words in ((walk / "photos", ["--every", 2], "--every is for predict with a video"),
                                (good, ["--watch"], "--watch is for predict with a folder"),
                                (good, ["--cache_dir", tmp_path], "leave it out with a video")):
        status, line = fails(walk, images, *more)
        assert status == 2 and words in line
    monkeypatch.setitem(sys.modules, "av", None)
    status, line = fails(walk, good)
    assert status == 2 and "good.mp4: videos are read by PyAV, which is not installed; pip install av" in line
    predict(walk, walk / "photos")  # needs no PyAV


def test_photos_are_taken_from_a_video(walk, tmp_path, monkeypatch):
    shown, matrix = SHOWN[90]
    path = write_video(tmp_path / "walk.mp4", [SHOWN[270][0](frame) for frame in frames_of(walk)])
    rotate(path, matrix)
    taken = {}

    def look(args, folder):  # instead of COLMAP, which test_prepare_photos.py runs
        taken.update({name: np.asarray(Image.open(f"{folder}/{name}")) for name in sorted(os.listdir(folder))})

    monkeypatch.setattr(prepare_photos, "prepare", look)
    for more, step in (((), RATE // 2), (("--fps", "3"), None), (("--fps", "100"), 1)):
        taken.clear()
        status, output, errors = run_module_here(prepare_photos, path, tmp_path / "out", *more)
        numbers = range(0, N, step) if step else (0, 3, 6, 8, 11, 14, 16, 19, 22)  # three a second
        assert status == 0 and list(taken) == [f"walk-{i:06d}.jpg" for i in numbers], errors
        assert output == f"{path}: {len(numbers)} frames taken\n"
    for i, image in enumerate(taken.values()):
        pixels = frames_of(walk)[i].astype(int)
        assert image.shape == (HEIGHT, WIDTH, 3) and np.abs(image - pixels).mean() < 8
    status, _, errors = run_module_here(prepare_photos, walk / "photos", tmp_path / "out", "--fps", "3")
    assert status == 2 and "--fps: is for a video" in errors
