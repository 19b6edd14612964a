"""The local tier: the contract, links, permissions, refusals of the operating system, what is left behind."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptengine.errors import AlreadyExists, CheckpointError, StorageFailed
from ckptengine.tiers import local_files, mounts
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop

from ..descriptors import open_under
from . import services
from .contract import BIG, PART, TierContract, loop, put_all

__all__ = ["loop"]


class TestLocalTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> LocalTier:
        return LocalTier(tmp_path / "deep" / "root")

    def test_nothing_temporary_is_left(self, flat: BlockingTier, tier: LocalTier, loop: IoLoop) -> None:
        flat.create("step-000000001/a", b"a")
        self.send(loop, tier, "step-000000001/b", BIG)
        with pytest.raises(AlreadyExists):
            flat.create("step-000000001/a", b"b")
        assert sorted(os.listdir(tier.root)) == ["step-000000001"]
        assert sorted(os.listdir(tier.root / "step-000000001")) == ["a", "b"]

    def test_the_store_s_own_hidden_files_are_not_objects(self, flat: BlockingTier, tier: LocalTier) -> None:
        (tier.root / ".lock").write_bytes(b"1")
        (tier.root / "step-000000001").mkdir()
        (tier.root / "step-000000001" / ".manifest-a000001-n0001.json.77.tmp").write_bytes(b"1")
        assert flat.entries() == []
        assert flat.sweep("step-000000001/") == ["step-000000001/.manifest-a000001-n0001.json.77.tmp"]
        assert os.listdir(tier.root) == [".lock"]


@pytest.fixture(scope="module")
def fuse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with services.fuse(tmp_path_factory.mktemp("fuse")) as mount:
        yield mount


class TestFuse(TierContract):
    """A network file system through FUSE."""

    @pytest.fixture
    def tier(self, fuse: Path) -> LocalTier:
        return LocalTier(fuse / uuid.uuid4().hex)


@pytest.fixture
def flat(tmp_path: Path, loop: IoLoop) -> BlockingTier:
    return BlockingTier(LocalTier(tmp_path / "root"), loop, timeout_s=60)


def test_links_are_not_followed(flat: BlockingTier, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "direct.bin").symlink_to(secret / "file")
    (root / "step-000000001").symlink_to(secret)
    for name in ("direct.bin", "step-000000001/file"):
        with pytest.raises(CheckpointError):
            flat.read(name, 0, 1)
    with pytest.raises(CheckpointError):
        flat.create("step-000000001/new", b"")
    assert flat.entries() == []
    assert os.listdir(secret) == ["file"]


def test_what_is_not_a_regular_file_does_not_hang(flat: BlockingTier, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "root" / "pipe.bin")
    with pytest.raises(StorageFailed):
        flat.read("pipe.bin", 0, 1)


def test_modes(tmp_path: Path, loop: IoLoop) -> None:
    old = os.umask(0o027)
    try:
        flat = BlockingTier(LocalTier(tmp_path / "a"), loop)
        flat.create("s/x", b"")
        private = BlockingTier(LocalTier(tmp_path / "b", file_mode=0o600, directory_mode=0o700), loop)
        private.create("s/x", b"")
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a", "a/s", "a/s/x", "b", "b/s", "b/s/x")]
    assert modes == [0o750, 0o750, 0o640, 0o700, 0o700, 0o600]


def test_order_of_system_calls(tmp_path: Path, loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is flushed before it gets its name, and the name is flushed before the call returns."""
    flat = BlockingTier(LocalTier(tmp_path), loop)
    calls: list[str] = []
    for name in ("fsync", "link", "unlink", "mkdir"):
        real = getattr(os, name)

        def record(*args: object, _real: object = real, _name: str = name, **kwargs: object) -> object:
            is_directory = _name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)  # type: ignore[arg-type]
            calls.append("fsync directory" if is_directory else _name)
            return _real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(os, name, record)
    flat.create("step-000000001/x", b"data")
    assert calls == ["mkdir", "fsync directory", "fsync", "link", "unlink", "fsync directory"]
    calls.clear()
    loop.run(upload(LocalTier(tmp_path), "step-000000001/y"), 60)
    assert calls[-4:] == ["fsync", "link", "unlink", "fsync directory"]


async def upload(tier: LocalTier, name: str) -> None:
    await put_all(await tier.upload(name, len(BIG), PART), BIG)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "link", "posix_fallocate"])
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("what", ["create", "upload"])
def test_refusals_are_named_and_leave_nothing(
    tmp_path: Path, loop: IoLoop, monkeypatch: pytest.MonkeyPatch, call: str, number: int, times: int, what: str
) -> None:
    if what == "create" and call == "posix_fallocate":
        pytest.skip("a small object allocates nothing ahead")
    tier = LocalTier(tmp_path / "root")
    flat = BlockingTier(tier, loop)
    flat.create("step-000000001/good", b"good")
    open_before = open_under(tmp_path)
    left = [times]
    real = getattr(os, call)

    def refuse(*args: object, **kwargs: object) -> object:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(StorageFailed, match=errno.errorcode[number]):
            loop.run(tier.create("s/x", b"data") if what == "create" else upload(tier, "s/y"), 60)
    assert flat.read("step-000000001/good", 0, 4) == b"good"
    assert [entry.name for entry in flat.entries()] == ["step-000000001/good"]
    flat.create("step-000000001/x", b"works again")
    assert open_under(tmp_path) == open_before


def test_a_failed_flush_is_never_retried_into_success(
    tmp_path: Path, loop: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = LocalTier(tmp_path)

    async def go() -> None:
        started = await tier.upload("r.bin", len(BIG), PART)
        receipts = {i: await started.put(i, BIG[i * PART : (i + 1) * PART]) for i in range(3)}
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(StorageFailed, match="EIO"):
                await started.finish(receipts)
        with pytest.raises(CheckpointError):
            await started.finish(receipts)
        with pytest.raises(CheckpointError):
            await (await tier.upload("r.bin", len(BIG), PART, started.token)).finish(receipts)

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "")

    loop.run(go(), 60)
    assert BlockingTier(tier, loop).entries() == []


def test_without_hard_links(tmp_path: Path, loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "link", refuse)
    tier = LocalTier(tmp_path)
    assert not tier.abilities.conditional_put
    flat = BlockingTier(tier, loop)
    flat.create("a", b"1")
    with pytest.raises(AlreadyExists):
        flat.create("a", b"2")
    assert flat.read("a", 0, 1) == b"1"
    assert os.listdir(tmp_path) == ["a"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in ("file", "file/below"):
        with pytest.raises(CheckpointError, match="file"):
            LocalTier(tmp_path / path)


def test_a_root_that_vanishes(flat: BlockingTier, tmp_path: Path) -> None:
    flat.create("s/a", b"")
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed, match="root"):
        flat.create("s/b", b"")
    with pytest.raises(CheckpointError):
        flat.read("s/a", 0, 0)
    assert not (tmp_path / "root").exists(), "a disk that is gone must not be replaced by its mount point"


def test_reading_creates_nothing(tmp_path: Path, loop: IoLoop) -> None:
    flat = BlockingTier(LocalTier(tmp_path / "none", create=False), loop)
    assert flat.entries() == []
    assert flat.stat("a") is None
    assert not (tmp_path / "none").exists()


def test_which_file_systems_lose_their_content(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /dev/shm rw shared:1 - tmpfs tmpfs rw\n"
        "3 1 0:6 / /with\\040space rw - tmpfs tmpfs rw\n"
        "4 1 0:7 / /over rw - tmpfs tmpfs rw\n"
        "5 1 8:2 / /over rw - xfs /dev/sdb rw\n"
    )
    kinds = {path: mounts.filesystem_of(Path(path), table) for path in ("/x", "/dev/shm/x", "/with space/a", "/over/a")}
    assert kinds == {"/x": "ext4", "/dev/shm/x": "tmpfs", "/with space/a": "tmpfs", "/over/a": "xfs"}
    assert mounts.filesystem_of(Path("/"), tmp_path / "absent") is None


def test_short_writes_are_continued(tmp_path: Path, loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(local_files.os, "pwrite", lambda fd, data, offset: real(fd, data[:4097], offset))
    flat = BlockingTier(LocalTier(tmp_path), loop)
    flat.create("a", BIG[:100_000])
    assert flat.read("a", 0, 100_000) == BIG[:100_000]
