"""Downloading official archives, against a server that misbehaves."""
import io
import re
import shutil
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prepare_layouts import (
    call_well,
    error_of,
    listing_below,
    read_rows,
    run_without_space,
    write_7scenes,
    write_archive,
    write_cambridge,
)

from datasets import downloads, prepare_7scenes, prepare_cambridge
from datasets.official import CAMBRIDGE, SEVEN_SCENES


@pytest.fixture
def server(monkeypatch):
    """A server of `files`, {path: bytes}, that records `requests`, (path, Range or None), and misbehaves by `fault`.

    fault: None, 'no ranges', 'drops' (in the middle of the rest), 'resets' (the first connection), 'truncates' (at the
    same place each time), 'page'.
    """
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            files, fault = self.server.files, self.server.fault
            asked = self.headers["Range"]
            self.server.requests.append((self.path, asked))
            if self.path not in files:
                return self.send_error(404)
            body = files[self.path]
            ranged = asked and fault not in ("no ranges", "truncates")
            first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if ranged else 0
            if first and first >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - first))
            self.send_header("Content-Type", "text/html" if fault == "page" else "application/zip")
            self.end_headers()
            rest = body[first:]
            if fault == "drops" and len(rest) > 4000 or fault == "truncates":
                rest = rest[:len(rest) // 2]
            if fault == "resets" and len(self.server.requests) == 1:
                rest = rest[:len(rest) // 2]
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.write(rest)
            return None

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "WAITS", (0, 0, 0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests, running.fault = {}, [], None
        running.url = f"http://127.0.0.1:{running.server_port}/base"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def chess(server, tmp_path):
    """The archive of the scene chess, which the server has."""
    archive = write_archive(tmp_path / "served.zip", write_7scenes(tmp_path / "source"))
    server.files["/base/chess.zip"] = archive.read_bytes()
    return archive.read_bytes()


def chess_from(server, tmp_path, more=("--yes",)):
    return [prepare_7scenes, tmp_path / "data", "--labels_path", tmp_path / "labels", "--download", "--url", server.url,
            "--scenes", "chess", *more]


@pytest.mark.parametrize("fault", (None, "no ranges", "drops", "resets"))
def test_a_scene_is_downloaded_whatever_the_connection(fault, server, chess, tmp_path):
    server.fault = fault
    output = call_well(*chess_from(server, tmp_path))
    assert SEVEN_SCENES.licence in output
    assert listing_below(tmp_path / "data" / "chess") == listing_below(tmp_path / "source" / "chess")
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_chess_train.csv")) == 3
    if fault == "drops":  # each request asks for what is missing, and for no more
        expected, have = [("/base/chess.zip", None)], 0
        while len(chess) - have > 4000:
            have += (len(chess) - have) // 2
            expected.append(("/base/chess.zip", f"bytes={have}-"))
        assert server.requests == expected and len(expected) > 2
    else:
        assert server.requests[0] == ("/base/chess.zip", None) and len(server.requests) == 1 + (fault == "resets")

    server.requests.clear()
    shutil.rmtree(tmp_path / "labels")
    call_well(*chess_from(server, tmp_path, more=()))  # nothing to fetch: nothing to agree to
    assert server.requests == [] and (tmp_path / "labels/abs_7scenes_pose.csv_chess_test.csv").exists()


@pytest.mark.parametrize("have, fault, asked", ((5000, None, ["bytes=5000-"]),
                                                (5000, "no ranges", ["bytes=5000-"]),
                                                ("all", None, ["bytes={}-"]),
                                                ("more", None, ["bytes={}-", None])))
def test_an_interrupted_file_is_resumed(have, fault, asked, server, chess, tmp_path):
    server.fault = fault
    left = {"all": chess, "more": chess + b"of another file"}.get(have) or chess[:have]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chess.zip.part").write_bytes(left)
    call_well(*chess_from(server, tmp_path))
    assert [range_ for _, range_ in server.requests] == [a and a.format(len(left)) for a in asked]
    assert (tmp_path / "data" / "chess.zip").read_bytes() == chess
    assert not (tmp_path / "data" / "chess.zip.part").exists()


@pytest.mark.parametrize("fault, n_requests, words", (
    ("absent", 1, "/base/chess.zip: the server answers 404"),
    ("page", 1, "/base/chess.zip: a web page, not an archive"),
    ("truncates", 4, "/base/chess.zip: the download makes no progress: the connection ended after "),
    ("damaged", 1, "chess.zip: a truncated or damaged archive"),
))
def test_a_download_that_cannot_be_had(fault, n_requests, words, server, chess, tmp_path):
    if fault == "absent":
        server.files.clear()
    elif fault == "damaged":
        server.files["/base/chess.zip"] = chess[:5000]
    server.fault = fault
    assert words in error_of(*chess_from(server, tmp_path))
    assert len(server.requests) == n_requests
    assert not (tmp_path / "labels").exists() and not (tmp_path / "data" / "chess").exists()
    assert (tmp_path / "data" / "chess.zip").exists() == (fault == "damaged")


def test_a_server_that_is_not_there(server, tmp_path):
    server.url = "http://127.0.0.1:1"
    assert "http://127.0.0.1:1/chess.zip: the download makes no progress: " in error_of(*chess_from(server, tmp_path))
    server.url = "http://127.0.0.1:port"
    assert "not a usable address" in error_of(*chess_from(server, tmp_path))


def test_cambridge_is_fetched_from_the_addresses_of_its_scenes(server, tmp_path):
    numbers = {"KingsCollege": 251342, "OldHospital": 251340, "ShopFacade": 251336, "StMarysChurch": 251294,
               "GreatCourt": 251291}
    for scene, number in numbers.items():
        write_cambridge(tmp_path / "source", scene)
        archive = shutil.make_archive(tmp_path / "served", "zip", tmp_path / "source", scene)
        server.files[f"/base/{number}/{scene}.zip"] = Path(archive).read_bytes()
    output = call_well(prepare_cambridge, tmp_path / "data", "--labels_path", tmp_path / "labels", "--download",
                       "--yes", "--url", f"{server.url}/")
    assert {path for path, _ in server.requests} == set(server.files) and len(server.requests) == 5
    assert CAMBRIDGE.licence in output and "without" not in output
    assert len(list((tmp_path / "labels").iterdir())) == 11
    assert {row[0] for row in read_rows(tmp_path / "labels/cambridge_four_scenes.csv")} == set(numbers) - {"GreatCourt"}


def test_no_space_while_downloading(server, chess, tmp_path):
    module, *arguments = chess_from(server, tmp_path)
    process = run_without_space(4096, "datasets.prepare_7scenes", *arguments)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "chess.zip.part: cannot be written: File too large" in process.stderr and len(server.requests) == 1
    call_well(module, *arguments)  # with more space it resumes
    assert server.requests[1:] == [("/base/chess.zip", "bytes=4096-")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_licence_is_asked_about_once(server, chess, tmp_path, monkeypatch):
    assert "add --yes" in error_of(*chess_from(server, tmp_path, more=()))  # there is no terminal here
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert "unless you agree" in error_of(*chess_from(server, tmp_path, more=()))
    assert server.requests == [] and not (tmp_path / "data").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    output = call_well(*chess_from(server, tmp_path, more=()))
    assert output.count("[y/N]") == 1 and SEVEN_SCENES.licence in output and len(server.requests) == 1
