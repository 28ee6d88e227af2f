"""Published weights are downloaded, against a local server that plays the drive's answers."""
import hashlib
import http.server
import io
import re
import threading
import urllib.parse

import pytest
import requests
import torch
from conftest import run_module_here

from models import download, get_model
from models.pose_encoder import PoseEncoder

SMALL = {"hidden_dim": 16, "backbone_type": "mobilenet"}
NAMES = ["posenet_mobilenet_kingscollege", "pae_posenet_mobilenet_kingscollege"]


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


class Drive(http.server.ThreadingHTTPServer):
    """Answers as the drive does: a confirm page with a form first, then the file, from the byte that is asked for.

    files: {id: bytes}. cut: bytes after which the connection breaks off, once. page: a page in the place of files.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.page, self.served = {}, None, None, []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        drive, content = self.server, self.server.files.get(query.get("id", [""])[0])
        if drive.page is not None or content is None or "confirm" not in query:
            confirm = ('<html><body><form id="download-form" action="https://drive.usercontent.google.com/download">'
                       f'<input type="hidden" name="id" value="{query.get("id", [""])[0]}">'
                       '<input type="hidden" name="confirm" value="t"></form></body></html>')
            page = (drive.page or confirm).encode()
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        drive.served.append(begin)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", 'attachment; filename="weights.pth"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[begin:drive.cut])
        if drive.cut is not None:
            self.close_connection = True


@pytest.fixture
def drive(monkeypatch):
    server = Drive()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    send = requests.Session.request

    def to_server(self, method, url, **options):
        parts = urllib.parse.urlsplit(url)
        assert parts.netloc.endswith("google.com")
        return send(self, method, f"http://127.0.0.1:{server.server_port}{parts.path}?{parts.query}", **options)

    monkeypatch.setattr(requests.Session, "request", to_server)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    torch.manual_seed(0)
    for name, module in zip(NAMES, (get_model("posenet", "none", SMALL), PoseEncoder(16))):
        server.files[download.FILES[name][1]] = saved(module)
    yield server
    server.shutdown()


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
