"""Published weights are downloaded, against a local server that plays the drive's answers."""
import hashlib
import resource

import pytest
import requests
import torch
from conftest import run_module_here
from drive import saved

from models import download, get_model
from models.pose_encoder import PoseEncoder

SMALL = {"hidden_dim": 16, "backbone_type": "mobilenet"}
NAMES = ["posenet_mobilenet_kingscollege", "pae_posenet_mobilenet_kingscollege"]


@pytest.fixture(autouse=True)
def files(drive):
    torch.manual_seed(0)
    for name, module in zip(NAMES, (get_model("posenet", "none", SMALL), PoseEncoder(16))):
        drive.files[download.FILES[name][1]] = saved(module)


def test_files_come_whole_are_checked_and_have_their_sums(drive, tmp_path):
    status, output, errors = run_module_here(download, *NAMES, "--to", tmp_path / "weights")
    assert status == 0, errors
    sums = {}
    for name in NAMES:
        content = drive.files[download.FILES[name][1]]
        assert (tmp_path / "weights" / f"{name}.pth").read_bytes() == content
        sums[f"{name}.pth"] = hashlib.sha256(content).hexdigest()
        assert sums[f"{name}.pth"] in output
    listed = dict(line.split()[::-1] for line in (tmp_path / "weights" / "SHA256SUMS").read_text().splitlines())
    assert listed == sums and "posenet (hidden_dim 16)" in output
    drive.files.clear()
    assert run_module_here(download, *NAMES, "--to", tmp_path / "weights")[0] == 0  # nothing is fetched again
    (tmp_path / "weights" / f"{NAMES[1]}.pth").write_bytes(saved(PoseEncoder(16)))
    status, _, errors = run_module_here(download, *NAMES, "--to", tmp_path / "weights")
    assert status == 2 and "it has changed" in errors


def test_a_cut_off_download_is_resumed(drive, tmp_path):
    [name] = NAMES[:1]
    content = drive.files[download.FILES[name][1]]
    drive.cut = len(content) // 2
    status, _, errors = run_module_here(download, name, "--to", tmp_path)
    assert status == 2 and "run again to resume it" in errors and download.FILES[name][1] in errors
    assert not (tmp_path / f"{name}.pth").exists()
    drive.cut, drive.served[:] = None, []
    assert run_module_here(download, name, "--to", tmp_path)[0] == 0
    assert (tmp_path / f"{name}.pth").read_bytes() == content and max(drive.served) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", f"{name}.pth"]


@pytest.mark.parametrize("page, words", [
    ('<html><body><p class="uc-error-subcaption">Too many users have viewed or downloaded this file.</p></body></html>',
     ["its quota may be used up", "Too many users"]),
    ("<html><body>Sign in</body></html>", ["the drive gives a web page, no file"])])
def test_a_web_page_is_told_from_a_file(drive, tmp_path, page, words):
    drive.page = page
    status, _, errors = run_module_here(download, NAMES[0], "--to", tmp_path)
    assert status == 2 and all(word in errors for word in (*words, f"file/d/{download.FILES[NAMES[0]][1]}/view"))
    assert errors.count("\n") == 1 and not list(tmp_path.glob("*.pth"))


def test_another_file_under_the_right_name_is_refused(drive, tmp_path):
    drive.files[download.FILES[NAMES[0]][1]] = drive.files[download.FILES[NAMES[1]][1]]
    status, _, errors = run_module_here(download, *NAMES, "--to", tmp_path)
    assert status == 2 and "holds single-scene PAE, but posenet was expected" in errors
    assert [path.name for path in sorted(tmp_path.glob("*.pth*"))] == [f"{NAMES[1]}.pth"]  # the other is complete
    (tmp_path / f"{NAMES[0]}.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    status, _, errors = run_module_here(download, NAMES[0], "--to", tmp_path)
    assert status == 2 and "a web page, not weights" in errors
    status, _, errors = run_module_here(download, "posenet_vgg")
    assert status == 2 and "posenet_vgg is not among the published weights" in errors


def test_without_a_network_one_line_names_the_link_and_the_place(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests.Session, "request", refuse)
    status, _, errors = run_module_here(download, *NAMES, "--to", tmp_path)
    last = errors.splitlines()[-1]  # after those of gdown's tries
    assert status == 2 and "the download failed" in last
    assert f"file/d/{download.FILES[NAMES[0]][1]}/view in a browser" in last
    assert f"save the file as {tmp_path / NAMES[0]}.pth" in last and not list(tmp_path.glob("*.pth"))


def test_a_full_disk_leaves_no_weights(drive, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a file beyond it fails as on a full disk
    try:
        status, _, errors = run_module_here(download, NAMES[0], "--to", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and f"{NAMES[0]}.pth.part: cannot be written: File too large" in errors
    assert not list(tmp_path.glob("*.pth"))
