"""Files beneath a root: nothing outside is reached, nothing short is returned, no secret is shown."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest

from ckptengine.errors import CheckpointError, NotFound, Truncated, UnreadableFormat, UnusableRequest
from ckptengine.sources.files import MAX_OPEN_FILES, InlineFiles, LocalFiles, open_files
from ckptengine.sources.port import Files
from ckptengine.tiers.redact import redacted_url

from ..descriptors import open_descriptors


@pytest.fixture(params=["local", "remote", "inline"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """The same two files behind every implementation."""
    if request.param == "remote":
        system = fsspec.filesystem("memory")
        root = f"/{tmp_path.name}"
        system.pipe_file(f"{root}/a.bin", bytes(range(100)))
        system.pipe_file(f"{root}/folder/b.bin", b"inner")
        return open_files(f"memory:/{root}")
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "root" / "a.bin").write_bytes(bytes(range(100)))
    (tmp_path / "root" / "folder" / "b.bin").write_bytes(b"inner")
    local = open_files(tmp_path / "root")
    return InlineFiles(local) if request.param == "inline" else local


class TestContract:
    def test_reads(self, files: Files) -> None:
        assert files.size("a.bin") == 100
        assert files.read("a.bin", 10, 5) == bytes(range(10, 15))
        assert files.read("a.bin", 100, 0) == b""
        buffer = bytearray(7)
        files.read_into("./folder//b.bin", 0, memoryview(buffer)[1:6])
        assert bytes(buffer) == b"\0inner\0"

    def test_entries_and_sub(self, files: Files) -> None:
        assert files.entries() == ["a.bin", "folder/"]
        assert files.entries("nothing") == []
        assert files.exists("folder")
        assert files.exists("a.bin")
        assert not files.exists("c.bin")
        inner = files.sub("folder")
        assert inner.entries() == ["b.bin"]
        assert inner.read("b.bin", 1, 2) == b"nn"

    def test_short_files_are_truncated(self, files: Files) -> None:
        with pytest.raises(Truncated, match=r"a\.bin has 100 bytes"):
            files.read("a.bin", 90, 11)
        with pytest.raises(Truncated, match=r"a\.bin"):
            files.read_into("a.bin", 101, memoryview(bytearray(1)))
        for offset, nbytes in ((-1, 5), (5, -1)):
            with pytest.raises(UnreadableFormat):
                files.read("a.bin", offset, nbytes)

    def test_missing_files_are_named(self, files: Files) -> None:
        for path in ("c.bin", "a.bin/c"):
            with pytest.raises(NotFound, match="does not exist"):
                files.size(path)

    @pytest.mark.parametrize("path", ["../a.bin", "/etc/hostname", "folder/../../a", "a\0b"])
    def test_paths_stay_beneath_the_root(self, files: Files, path: str) -> None:
        with pytest.raises(UnreadableFormat, match="leads out"):
            files.size(path)

    def test_reads_after_close(self, files: Files) -> None:
        files.size("a.bin")
        files.close()
        assert files.read("a.bin", 0, 1) == b"\0"


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "data").write_bytes(b"inside")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to("data")
    (root / "loop").symlink_to("loop")
    files = LocalFiles(str(root))
    assert files.read("in", 0, 6) == b"inside"
    with pytest.raises(UnreadableFormat, match="leads out"):
        files.size("out")
    assert not files.exists("out")
    with pytest.raises(CheckpointError):
        files.size("loop")


def test_the_cache_of_hugging_face_may_link_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(b"weights")
    (snapshot / "model.bin").symlink_to("../../blobs/1")
    (snapshot / "out").symlink_to(tmp_path)
    files = LocalFiles(str(snapshot))
    assert files.read("model.bin", 0, 7) == b"weights"
    assert not files.exists("out")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFormat, match="regular"):
        LocalFiles(str(tmp_path)).size("pipe")
    with pytest.raises(UnreadableFormat, match="regular"):
        LocalFiles(str(tmp_path)).size("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "a").chmod(0)
    with pytest.raises(UnusableRequest, match="permissions"):
        LocalFiles(str(tmp_path)).size("a")


def test_open_files_are_bounded_and_let_go(tmp_path: Path) -> None:
    count = MAX_OPEN_FILES + 40
    for number in range(count):
        (tmp_path / str(number)).write_bytes(number.to_bytes(2, "little") * 1000)
    before = open_descriptors()
    files = LocalFiles(str(tmp_path))
    wrong: list[int] = []

    def read() -> None:
        for number in range(count):
            if files.read(str(number), 500, 2) != number.to_bytes(2, "little"):
                wrong.append(number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert open_descriptors() <= before + MAX_OPEN_FILES + 1
    files.close()
    assert open_descriptors() <= before + 1


def test_inline_bytes_have_paths_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"file")
    files = InlineFiles(LocalFiles(str(tmp_path)))
    path = files.add(b"12345678")
    assert files.add(b"12345678") == path
    assert files.add(b"other") != path
    assert files.read(path, 2, 3) == b"345"
    assert files.size(path) == 8
    assert files.local_path(path) is None
    assert files.local_path("a") == str((tmp_path / "a").resolve())
    with pytest.raises(Truncated):
        files.read(path, 0, 9)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://user:pass@host/bucket/x?token=abc#f", "s3://host/bucket/x"),
        ("ftp://me:p%40ss@host:21/x", "ftp://host:21/x"),
        ("zip::s3://key:secret@b/x.zip", "zip::s3://b/x.zip"),
        ("memory://x/y", "memory://x/y"),
    ],
)
def test_credentials_are_never_shown(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


def test_errors_of_file_systems_hide_credentials() -> None:
    with pytest.raises(CheckpointError) as caught:
        open_files("no-such-protocol://me:hunter2@host/x?sig=abc")
    assert "hunter2" not in str(caught.value)
    assert "sig=abc" not in str(caught.value)
    assert caught.value.__suppress_context__
