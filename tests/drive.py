"""A local server in the place of the drive of the published weights."""
import http.server
import io
import re
import threading
import urllib.parse

import pytest
import requests
import torch


def saved(module):
    """The bytes of a weights file."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


class Drive(http.server.ThreadingHTTPServer):
    """Answers as the drive does: a confirm page with a form first, then the file, from the byte that is asked for.

    files: {id: bytes}. cut: bytes after which the connection breaks off, once. page: a page in the place of files.
    served: the first byte of every answer with a file.
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
    """A running Drive, which all requests to the real one reach."""
    server = Drive()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    send = requests.Session.request

    def to_server(self, method, url, **options):
        parts = urllib.parse.urlsplit(url)
        assert parts.netloc.endswith("google.com")
        return send(self, method, f"http://127.0.0.1:{server.server_port}{parts.path}?{parts.query}", **options)

    monkeypatch.setattr(requests.Session, "request", to_server)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
