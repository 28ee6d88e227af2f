"""Archives of official downloads: unpacked completely or not at all, and nothing outside their folder."""
import io
import os
import shutil
import stat
import zipfile

import pytest
from prepare_layouts import (
    call_well,
    error_of,
    listing,
    listing_below,
    read_rows,
    run_without_space,
    write_7scenes,
    write_archive,
)

from datasets import prepare_7scenes


def test_archives_downloaded_by_hand_are_unpacked_and_kept(tmp_path):
    chess = write_7scenes(tmp_path / "source")
    archive = write_archive(tmp_path / "chess.zip", chess)
    (tmp_path / "chess.part" / "chess").mkdir(parents=True)
    (tmp_path / "chess.part" / "chess" / "seq-09.zip").write_bytes(b"PK")  # what an interrupted run left
    shutil.copytree(chess, tmp_path / "fire")
    write_archive(tmp_path / "inner.zip", chess)
    with zipfile.ZipFile(tmp_path / "inner.zip") as file:
        (tmp_path / "fire" / "seq-02.zip").write_bytes(file.read("chess/seq-02.zip"))
    shutil.rmtree(tmp_path / "fire" / "seq-02")
    call_well(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert listing_below(tmp_path / "chess") == listing_below(chess)
    assert archive.exists() and (tmp_path / "fire" / "seq-02.zip").exists() and not (tmp_path / "chess.part").exists()
    assert len(read_rows(tmp_path / "labels/abs_7scenes_pose.csv_fire_test.csv")) == 3


def link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


HOSTILE = ["../evil.txt", "/evil.txt", "chess/../../evil.txt", "chess\\..\\..\\evil.txt", "C:/evil.txt", "c:evil.txt",
           link("chess/evil.txt")]


@pytest.mark.parametrize("within", (False, True))
@pytest.mark.parametrize("member", HOSTILE, ids=lambda member: getattr(member, "filename", member))
def test_a_member_outside_the_folder_is_refused(member, within, tmp_path):
    chess = write_7scenes(tmp_path / "source")
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    archive = write_archive(root / "chess.zip", chess)
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile if within else archive, "a") as file:
        file.writestr("seq-03/frame-000000.color.png", "")
        file.writestr(member, "../../somewhere")
    if within:
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("chess/seq-03.zip", hostile.getvalue())
    before = listing(tmp_path)
    error = error_of(prepare_7scenes, root, "--labels_path", tmp_path / "labels")
    assert "chess.zip: " in error and "evil.txt" in error and ("link" in error or "outside the folder" in error)
    assert listing(tmp_path) == before and not os.path.exists("/evil.txt") and not (root / "chess").exists()


@pytest.mark.parametrize("within", (False, True))
def test_a_damaged_archive_is_named_and_nothing_is_left_of_it(within, tmp_path):
    archive = write_archive(tmp_path / "chess.zip", write_7scenes(tmp_path / "source"))
    if within:
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("chess/seq-03.zip", b"PK\3\4")
    else:
        contents = bytearray(archive.read_bytes())
        contents[3000] ^= 1  # the archive has all its members, and one is wrong
        archive.write_bytes(contents)
    error = error_of(prepare_7scenes, tmp_path, "--labels_path", tmp_path / "labels")
    assert "chess.zip: " in error and "truncated or damaged" in error and "delete" in error
    assert ("seq-03.zip" in error) == within
    assert {path.name for path in tmp_path.iterdir()} == {"chess.zip", "source"}


def test_no_space_while_unpacking(tmp_path):
    write_archive(tmp_path / "chess.zip", write_7scenes(tmp_path / "source"))
    process = run_without_space(1000, "datasets.prepare_7scenes", tmp_path, "--labels_path", tmp_path / "labels")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "chess.zip: cannot be unpacked to " in process.stderr and "File too large" in process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"chess.zip", "source"}
