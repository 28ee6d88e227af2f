"""Downloading a file: resumed where an earlier run left it, and tried again when the connection breaks off."""
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from util.errors import UserError
from util.files import writing

WAITS = (1, 3, 10, 30)  # seconds before another try, after tries that brought nothing new
TIMEOUT = 60  # seconds without a byte
CHUNK = 2 ** 20  # bytes


class BrokenOff(Exception):
    """A download that another try may complete."""


def download(url, path):
    """Fetch the file at `url` to `path`. Until it is complete its name is `<path>.part`, which a later run resumes.

    After a broken connection it is tried again: without limit while each try brings something new, and then len(WAITS)
    times. Raises UserError where the address has no such file, the server cannot be reached, or the disk cannot be
    written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    print(f"{url} -> {path}", flush=True)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    furthest, tries = -1, 0
    while True:
        try:
            _fetch_rest(url, part)
            break
        except BrokenOff as error:
            size = _size(part)
            tries = tries + 1 if size <= furthest else 0
            furthest = max(size, furthest)
            if tries == len(WAITS):
                raise UserError(f"{url}: the download makes no progress: {error}; run again to resume it") from error
            print(f"{path.name}: {error}; trying again in {WAITS[tries]} s", flush=True)
            time.sleep(WAITS[tries])
    with writing(path):
        os.replace(part, path)


def _fetch_rest(url, part):
    """Ask once for what `part` lacks of the file at `url`, and append it.

    Raises BrokenOff, or UserError for what another try cannot fix.
    """
    size = _size(part)
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if response.headers.get_content_type() == "text/html":
                raise UserError(f"{url}: a web page, not an archive; has the address changed? --url gives another")
            if response.status == 206:
                content = re.fullmatch(rf"bytes {size}-\d+/(\d+)", response.headers["Content-Range"] or "")
                if not content:
                    _start_over(part)
                total = int(content[1])
            else:  # the whole file, although the rest may have been asked for
                size, total = 0, int(response.headers["Content-Length"] or 0)
            _append(response, part, size, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the server has no more bytes: `part` is complete, or of another file
            if error.headers["Content-Range"] != f"bytes */{size}":
                _start_over(part)
        elif error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url}: the server answers {error.code} {error.reason}; "
                            "--url gives another address") from error
        else:
            raise BrokenOff(f"the server answers {error.code} {error.reason}") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise UserError(f"{url}: not a usable address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOff(str(getattr(error, "reason", error)) or "the connection broke off") from error


def _append(response, part, size, total):
    """Write a response to `part` behind its first `size` bytes. total: the size of the whole file, 0 if unknown."""
    with (tqdm(desc=part.stem, initial=size, total=total or None, unit="B", unit_scale=True, disable=None) as bar,
          writing(part), open(part, "ab" if size else "wb") as file):
        for chunk in _chunks(response):
            file.write(chunk)
            bar.update(len(chunk))
    if _size(part) < total:
        raise BrokenOff(f"the connection ended after {_size(part)} of {total} bytes")


def _chunks(response):
    """The chunks of a response. A broken connection raises BrokenOff here, or it would pass for a full disk."""
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOff(str(error) or "the connection broke off") from error


def _start_over(part):
    """Delete `part`, which is of another file than the server's. Raises BrokenOff."""
    with writing(part):
        part.unlink()
    raise BrokenOff("the bytes of an earlier run do not fit the server's file: starting over")


def _size(path):
    return path.stat().st_size if path.exists() else 0
