"""Drain: equal on arrival, resumed without sending twice, refused when damaged, committed once by one rank, bounded."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from ckptengine import native
from ckptengine.errors import CheckpointError, CoordinationFailed, DigestMismatch, SaveFailed, StorageFailed, Superseded
from ckptengine.operations.drain import Drain, DrainSettings
from ckptengine.operations.draining.commit import Named
from ckptengine.operations.draining.progress import ProgressLog
from ckptengine.operations.draining.rank_digest import rank_file_digest
from ckptengine.store import names, rankfile
from ckptengine.tiers.local import LocalTier, LocalUpload
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.memory import SHARED_MEMORY, MemoryTier
from ckptengine.tiers.port import Bytes, Receipt, TierPort

from ..descriptors import open_descriptors
from . import services
from .contract import loop
from .steps import Step, Threads, engine_threads, write_step

__all__ = ["loop"]

SMALL = DrainSettings(part_bytes=1 << 18, memory_bytes=1 << 20, parallel_parts=3, rank_timeout_s=20.0)


@pytest.fixture
def source(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> LocalTier:
    return LocalTier(tmp_path / "target")


def drain_one(loop: IoLoop, source: TierPort, target: TierPort, step: Step, settings: DrainSettings = SMALL):  # type: ignore[no-untyped-def]
    drain = Drain(source, target, loop, settings=settings)
    try:
        digest = loop.run(rank_file_digest(source, step.names[0], step.manifest.files[0]))
        return drain.submit(step.step, [step.drain_file(0, digest)], step.named).result(60)
    finally:
        assert drain.close(10)


def assert_equal(loop: IoLoop, source: TierPort, target: TierPort, step: Step) -> None:
    flat_source, flat_target = BlockingTier(source, loop), BlockingTier(target, loop)
    for name, record in zip(step.names, step.manifest.files, strict=True):
        assert flat_target.read(name, 0, record.nbytes) == flat_source.read(name, 0, record.nbytes)
    assert flat_target.read(step.named.name, 0, len(step.named.data)) == step.named.data


def test_carries_and_commits(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    report = drain_one(loop, source, target, step)
    assert_equal(loop, source, target, step)
    assert report.sent_bytes == step.manifest.nbytes
    assert report.read_back_bytes == step.manifest.nbytes, "a directory proves nothing by itself, so all is read back"
    assert sorted(os.listdir(source.root / "step-000000100")) == sorted(os.listdir(target.root / "step-000000100"))
    assert "ckptengine-drain" not in engine_threads()


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no memory file system at /dev/shm")
def test_from_memory(loop: IoLoop, target: LocalTier) -> None:
    base = Path(tempfile.mkdtemp(dir=SHARED_MEMORY))
    try:
        memory = MemoryTier("job", base=base)
        step = write_step(memory.root, 7)
        drain_one(loop, memory, target, step)
        assert_equal(loop, memory, target, step)
    finally:
        shutil.rmtree(base)


def test_nothing_is_there_before_the_manifest(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    order: list[str] = []

    class Watching(LocalTier):
        async def create(self, name: str, data: Bytes) -> None:
            order.extend(entry.name for entry in await self.entries())
            order.append(f"create {name}")
            await super().create(name, data)

    record = Named("attempts/000001.0.json", b"record")
    drain = Drain(source, Watching(target.root), loop, settings=SMALL)
    drain.submit(100, [step.drain_file()], step.named, [record]).result(60)
    drain.close()
    assert order == [
        step.names[0],
        "create attempts/000001.0.json",
        "attempts/000001.0.json",
        step.names[0],
        f"create {step.named.name}",
    ]


def test_a_second_drain_finds_it_there(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    drain_one(loop, source, target, step)
    report = drain_one(loop, source, target, step)
    assert (report.sent_bytes, report.resumed_bytes) == (0, step.manifest.nbytes)


@pytest.mark.parametrize("at", [5000, 60_000, -1, -100, -5000])
def test_damage_at_the_source_is_not_carried(loop: IoLoop, source: LocalTier, target: LocalTier, at: int) -> None:
    step = write_step(source.root, 100)
    path = source.root / step.names[0]
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        drain_one(loop, source, target, step)
    assert BlockingTier(target, loop).entries() == []
    assert not [name for name in os.listdir(source.root / "step-000000100") if name.startswith(".drain")]


@pytest.mark.parametrize("extents", [(), (0,), (1,), (16384,), (16385, 5), (3_000_000,), (7,) * 500])
def test_the_digest_from_the_index_is_that_of_the_bytes(
    loop: IoLoop, source: LocalTier, extents: tuple[int, ...]
) -> None:
    step = write_step(source.root, 1, extents=extents)
    data = (source.root / step.names[0]).read_bytes()
    assert loop.run(rank_file_digest(source, step.names[0], step.manifest.files[0])) == native.digest(data)


def test_every_single_flipped_byte_outside_the_body_is_noticed(loop: IoLoop, source: LocalTier) -> None:
    step = write_step(source.root, 1, extents=(100, 20_000))
    path = source.root / step.names[0]
    data = path.read_bytes()
    table = rankfile.decode_footer(data[-rankfile.FOOTER_BYTES :], len(data), "").table
    for at in [*range(0, 300, 7), *range(table, len(data), 3)]:
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        try:
            expected = loop.run(rank_file_digest(source, step.names[0], step.manifest.files[0]))
        except CheckpointError:
            assert at >= table
            continue
        assert at < table, "the table and the tail are checked when the digest is computed"
        assert expected == native.digest(flipped), "the header is not: it is known from the manifest, and checked there"


class Recording(LocalTier):
    """A local tier that counts parts, and can lose or bend one on the way."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.parts: list[int] = []
        self.fail_after: int | None = None
        self.bend: Callable[[int], bool] = lambda _: False

    async def upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> LocalUpload:
        upload = await super().upload(name, size_bytes, part_bytes, token)
        real = upload.put

        async def put(part: int, data: Bytes) -> Receipt:
            if self.fail_after is not None and len(self.parts) >= self.fail_after:
                raise StorageFailed("cannot write: the line is dead")
            self.parts.append(part)
            return await real(part, b"\xff" * len(data) if self.bend(len(self.parts)) else data)

        upload.put = put  # type: ignore[method-assign]
        return upload


def test_resumes_without_sending_parts_again(loop: IoLoop, source: LocalTier, tmp_path: Path) -> None:
    step = write_step(source.root, 100)
    flaky = Recording(tmp_path / "target")
    flaky.fail_after = 4
    one_by_one = replace(SMALL, parallel_parts=1)  # so that none is cut off in the middle
    with pytest.raises(StorageFailed, match="dead"):
        drain_one(loop, source, flaky, step, one_by_one)
    before = list(flaky.parts)
    flaky.fail_after = None
    report = drain_one(loop, source, flaky, step)
    assert_equal(loop, source, flaky, step)
    assert sorted(flaky.parts) == list(range(len(flaky.parts))), "each part went once"
    assert report.resumed_bytes == len(before) * SMALL.part_bytes
    assert report.sent_bytes + report.resumed_bytes == step.manifest.nbytes


def test_what_arrives_bent_is_sent_again_and_then_given_up(loop: IoLoop, source: LocalTier, tmp_path: Path) -> None:
    step = write_step(source.root, 100)
    bent = Recording(tmp_path / "once")
    bent.bend = lambda count: count == 3
    drain_one(loop, source, bent, step)
    assert_equal(loop, source, bent, step)
    always = Recording(tmp_path / "always")
    always.bend = lambda count: count % 5 == 3
    with pytest.raises(DigestMismatch, match="does not hold what was sent"):
        drain_one(loop, source, always, step)
    assert BlockingTier(always, loop).entries() == []


def test_a_committed_copy_is_never_replaced_by_a_damaged_one(
    loop: IoLoop, source: LocalTier, target: LocalTier
) -> None:
    step = write_step(source.root, 100)
    good = (source.root / step.names[0]).read_bytes()
    drain_one(loop, source, target, step)
    (source.root / step.names[0]).write_bytes(good[:5000] + b"\x00" + good[5001:])
    drain = Drain(source, target, loop, settings=SMALL)
    with pytest.raises(DigestMismatch, match="committed"):
        drain.submit(100, [step.drain_file()], step.named).result(60)
    drain.close()
    assert (target.root / step.names[0]).read_bytes() == good


def test_an_uncommitted_wreck_in_the_way_is_replaced(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    BlockingTier(target, loop).create(step.names[0], b"\x00" * step.manifest.nbytes)
    drain_one(loop, source, target, step)
    assert_equal(loop, source, target, step)


def test_a_superseded_job_commits_nothing(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    flat = BlockingTier(target, loop)
    flat.create(f"attempts/{names.attempt_claim(2)}", b"")
    with pytest.raises(Superseded, match="attempt 2"):
        drain_one(loop, source, target, step)
    assert flat.stat(step.named.name) is None


def test_taken_over_while_putting_the_manifest(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)

    class Late(LocalTier):
        async def create(self, name: str, data: Bytes) -> None:
            await super().create(name, data)
            if "manifest" in name:
                await super().create(f"attempts/{names.attempt_claim(2)}", b"")

    with pytest.raises(Superseded):
        drain_one(loop, source, Late(target.root), step)


def test_another_job_s_manifest_is_left_alone(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100)
    flat = BlockingTier(target, loop)
    flat.create(step.named.name, b"somebody else's")
    with pytest.raises(CheckpointError):
        drain_one(loop, source, target, step)
    assert flat.read(step.named.name, 0, 15) == b"somebody else's"


# -- many ranks -----------------------------------------------------------------------------------------------------


def drain_ranks(
    loop: IoLoop, source: TierPort, targets: Mapping[int, TierPort], step: Step, world: int
) -> list[object]:
    shared: dict[str, bytes] = {}
    drains = [
        Drain(source, targets[rank], loop, port=Threads(rank, world, shared), settings=SMALL) for rank in range(world)
    ]
    futures = [
        drain.submit(step.step, [step.drain_file(rank)], step.named if rank == 0 else None)
        for rank, drain in enumerate(drains)
    ]
    outcomes = [future.exception(60) or future.result() for future in futures]
    assert [drain.close(10) for drain in drains] == [True] * world
    return outcomes


def test_every_rank_carries_its_own_and_one_commits(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100, world=3, extents=(300_000, 5))
    outcomes = drain_ranks(loop, source, dict.fromkeys(range(3), target), step, 3)
    assert [getattr(outcome, "sent_bytes", outcome) for outcome in outcomes] == [r.nbytes for r in step.manifest.files]
    assert_equal(loop, source, target, step)


def test_when_one_rank_fails_none_commits_and_all_say_so(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100, world=3, extents=(300_000, 5))
    flaky = Recording(target.root)
    flaky.fail_after = 0
    outcomes = drain_ranks(loop, source, {0: target, 1: flaky, 2: target}, step, 3)
    assert isinstance(outcomes[1], StorageFailed)
    for other in (outcomes[0], outcomes[2]):
        assert isinstance(other, CoordinationFailed)
        assert "rank 1" in str(other)
        assert "dead" in str(other)
    assert BlockingTier(target, loop).stat(step.named.name) is None
    flaky.fail_after = None
    outcomes = drain_ranks(loop, source, {0: target, 1: flaky, 2: target}, step, 3)
    assert sum(outcome.sent_bytes for outcome in outcomes) == step.manifest.files[1].nbytes  # type: ignore[attr-defined]
    assert_equal(loop, source, target, step)


def test_a_rank_that_never_answers(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100, world=2, extents=(1000,))
    settings = DrainSettings(rank_timeout_s=0.2)
    drain = Drain(source, target, loop, port=Threads(0, 2, {}), settings=settings)
    with pytest.raises(CoordinationFailed, match="rank 1"):
        drain.submit(100, [step.drain_file(0)], step.named).result(10)
    assert drain.close(5)
    assert BlockingTier(target, loop).stat(step.named.name) is None


def test_close_does_not_wait_for_ranks_for_ever(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 100, world=2, extents=(1000,))
    drain = Drain(source, target, loop, port=Threads(0, 2, {}), settings=DrainSettings(rank_timeout_s=3600))
    future = drain.submit(100, [step.drain_file(0)], step.named)
    started_s = time.monotonic()
    assert not drain.close(0.2)
    assert time.monotonic() - started_s < 5
    assert isinstance(future.exception(0), SaveFailed)


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_order_pending_progress(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    steps = [write_step(source.root, number, extents=(500_000,)) for number in (1, 2, 3)]
    slow = DrainSettings(part_bytes=1 << 17, memory_bytes=1 << 18, parallel_parts=2, max_bytes_per_s=2e6)
    drain = Drain(source, target, loop, settings=slow)
    futures = [drain.submit(step.step, [step.drain_file()], step.named) for step in steps]
    assert drain.pending == (1, 2, 3)
    seen = set()
    while not futures[0].done():
        seen.add(drain.progress(1)[0])
        time.sleep(0.01)
    assert len(seen) > 2, "progress is seen while it goes on"
    [future.result(30) for future in futures]
    assert drain.pending == ()
    assert drain.close(5)
    with pytest.raises(CheckpointError, match="closed"):
        drain.submit(4, [], None)


def test_bandwidth_cap(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 1, extents=(1_000_000,))
    capped = DrainSettings(part_bytes=1 << 16, max_bytes_per_s=2e6)
    drain = Drain(source, target, loop, settings=capped)
    started_s = time.monotonic()
    drain.submit(1, [step.drain_file()], step.named).result(30)
    assert 0.4 < time.monotonic() - started_s < 5
    drain.close()


def test_parts_in_memory_are_bounded(loop: IoLoop, source: LocalTier, tmp_path: Path) -> None:
    step = write_step(source.root, 1, extents=(4_000_000,))
    held, most = [0], [0]

    class Counting(LocalTier):
        async def upload(self, name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> LocalUpload:
            upload = await super().upload(name, size_bytes, part_bytes, token)
            real = upload.put

            async def put(part: int, data: Bytes) -> Receipt:
                held[0] += len(data)
                most[0] = max(most[0], held[0])
                await asyncio.sleep(0.005)
                try:
                    return await real(part, data)
                finally:
                    held[0] -= len(data)

            upload.put = put  # type: ignore[method-assign]
            return upload

    settings = DrainSettings(part_bytes=1 << 16, memory_bytes=5 << 16, parallel_parts=50)
    drain_one(loop, source, Counting(tmp_path / "target"), step, settings)
    assert 3 << 16 <= most[0] <= 5 << 16


MEASURED = """
import sys, threading, pathlib
from ckptengine.operations.drain import Drain
from ckptengine.operations.draining.transfer import DrainFile
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop

def anonymous():
    return sum(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

root, name, size = sys.argv[1:]
loop = IoLoop()
drain = Drain(LocalTier(root + "/source"), LocalTier(root + "/target"), loop)
before = anonymous()
done = drain.submit(1, [DrainFile(name, int(size))], None)
peak = 0
while not done.done():
    peak = max(peak, anonymous() - before)
assert done.result().sent_bytes == int(size)
print(peak)
"""


def test_memory_is_bounded_whatever_the_size(loop: IoLoop, tmp_path: Path) -> None:
    name, size = "step-000000001/rank-00000-a000001-n0001.bin", 300 << 20
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(size)
    arguments = [sys.executable, "-c", MEASURED, str(tmp_path), name, str(size)]
    measured = subprocess.run(arguments, check=False, timeout=100, capture_output=True, text=True)
    assert measured.returncode == 0, measured.stderr
    assert int(measured.stdout) < 192 << 20


def test_many_cycles_leave_nothing_open(loop: IoLoop, source: LocalTier, tmp_path: Path) -> None:
    step = write_step(source.root, 1, extents=(1000,))
    drain_one(loop, source, LocalTier(tmp_path / "warm"), step)
    files, threads = open_descriptors(), len(engine_threads())
    for cycle in range(10):
        broken = Recording(tmp_path / f"target-{cycle}")
        broken.fail_after = 0 if cycle % 2 else None
        try:
            drain_one(loop, source, broken, step)
        except StorageFailed:
            assert cycle % 2
    assert open_descriptors() == files
    assert len(engine_threads()) <= threads + 16, "the pool of the loop is bounded"


def test_a_source_that_vanishes(loop: IoLoop, source: LocalTier, target: LocalTier) -> None:
    step = write_step(source.root, 1)
    source.root.rename(source.root.with_name("gone"))
    drain = Drain(source, target, loop, settings=SMALL)
    with pytest.raises(CheckpointError, match="rank-00000"):
        drain.submit(1, [step.drain_file()], step.named).result(30)
    drain.close()
    assert BlockingTier(target, loop).entries() == []


def test_a_full_source_can_still_be_drained(
    loop: IoLoop, source: LocalTier, target: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = write_step(source.root, 1)
    real = os.open

    def refuse(path: object, flags: int, *args: object, **kwargs: object) -> int:
        if flags & os.O_CREAT and ".drain-" in str(path):
            raise OSError(errno.ENOSPC, "")
        return real(path, flags, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    drain_one(loop, source, target, step)
    assert_equal(loop, source, target, step)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a file system of limited size needs root")
def test_a_full_disk(loop: IoLoop, source: LocalTier, tmp_path: Path) -> None:
    step = write_step(source.root, 1, extents=(6_000_000,))
    small = write_step(source.root, 2, extents=(1000,))
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("this environment refuses to mount a tmpfs")
    try:
        tier = LocalTier(mount / "root")
        with pytest.raises(StorageFailed, match="ENOSPC"):
            drain_one(loop, source, tier, step)
        assert BlockingTier(tier, loop).entries() == []
        drain_one(loop, source, tier, small)
        assert_equal(loop, source, tier, small)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# -- the progress log -------------------------------------------------------------------------------------------------


def test_a_torn_or_foreign_log_is_no_reason_to_believe_anything(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ProgressLog(path, 1000)
    log.begun("token", 100)
    for part in range(5):
        log.part(part, part * 7, Receipt(f"tag{part}", True))
    whole = path.read_bytes()
    assert sorted(log.load().receipts) == [0, 1, 2, 3, 4]
    assert log.load().crcs[3] == 21
    for cut in range(0, len(whole), 3):
        path.write_bytes(whole[:cut])
        sent = log.load()
        assert sorted(sent.receipts) == list(range(len(sent.receipts)))
        assert len(sent.receipts) == max(0, whole[:cut].count(b"\n") - 1)
    path.write_bytes(whole.replace(b"tag2", b"tag9"))
    assert sorted(log.load().receipts) == [0, 1], "a damaged line ends the log"
    path.write_bytes(whole)
    assert ProgressLog(path, 999).load().receipts == {}, "the log of a file of another size"
    assert ProgressLog(None, 1000).load().receipts == {}


# -- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory, loop: IoLoop) -> Iterator[str]:
    with services.moto(tmp_path_factory.mktemp("moto")) as endpoint:
        loop.run(services.make_bucket(endpoint), 30)
        yield endpoint


@pytest.fixture
def s3(moto: str, loop: IoLoop) -> Iterator[TierPort]:
    from ckptengine.tiers.remote import RemoteTier

    tier = loop.run(RemoteTier.open(f"s3://ckpt/{uuid.uuid4().hex}", options=services.s3_options(moto)), 60)
    yield tier
    loop.run(tier.close())


S3_SETTINGS = DrainSettings(part_bytes=5 << 20, memory_bytes=32 << 20, parallel_parts=4)


@pytest.mark.parametrize("tidying", ["missing", "refused"])
def test_what_broke_a_stream_is_what_is_told(
    loop: IoLoop, source: LocalTier, tidying: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that what had come of it could not be removed."""
    remote = pytest.importorskip("ckptengine.tiers.remote", reason="fsspec is not installed")
    step, target = write_step(source.root, 3), loop.run(remote.RemoteTier.open(f"memory://{uuid.uuid4().hex}/run"))

    def broken(self: object, data: object) -> None:
        raise PermissionError("quota exceeded")

    def refused(path: str) -> None:
        raise PermissionError("may not remove")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.write", broken)
    if tidying == "refused":
        monkeypatch.setattr(target.fs, "rm_file", refused)
    with pytest.raises(StorageFailed, match="quota exceeded"):
        drain_one(loop, source, target, step)
    assert ("may be left" in caplog.text) == (tidying == "refused")


def test_to_s3(loop: IoLoop, source: LocalTier, s3: TierPort) -> None:
    step = write_step(source.root, 100, extents=(17_000_000, 3))
    report = drain_one(loop, source, s3, step, S3_SETTINGS)
    assert report.read_back_bytes == 0, "S3 proves each part by its checksum"
    assert_equal(loop, source, s3, step)


def test_to_s3_without_proof_reads_back(
    loop: IoLoop, source: LocalTier, s3: TierPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptengine.tiers import multipart

    monkeypatch.setattr(multipart, "_md5", lambda data: "as an encrypting store answers")
    step = write_step(source.root, 100, extents=(6_000_000,))
    report = drain_one(loop, source, s3, step, S3_SETTINGS)
    assert report.read_back_bytes == step.manifest.nbytes


KILLED = """
import sys, pathlib, os, threading
from ckptengine.operations.drain import Drain, DrainSettings
from ckptengine.operations.draining.transfer import DrainFile
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.remote import RemoteTier
root, url, endpoint, key, secret, name, size, kill_after = sys.argv[1:]
loop = IoLoop()
target = loop.run(RemoteTier.open(url, options=dict(key=key, secret=secret, endpoint_url=endpoint)))
settings = DrainSettings(part_bytes=5 << 20, parallel_parts=1)
drain = Drain(LocalTier(root), target, loop, settings=settings)
drain.submit(100, [DrainFile(name, int(size))], None)
while drain.progress(100)[0] < int(kill_after):
    pass
os.kill(os.getpid(), 9)
"""


def test_the_next_process_goes_on_after_a_kill(loop: IoLoop, source: LocalTier, s3: TierPort, moto: str) -> None:
    step = write_step(source.root, 100, extents=(28_000_000,))
    name, size = step.names[0], step.manifest.files[0].nbytes
    arguments = [str(source.root), s3.label, moto, services.USER, services.SECRET, name, str(size), str(10 << 20)]
    died = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=100, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert BlockingTier(s3, loop).entries() == []
    report = drain_one(loop, source, s3, step, S3_SETTINGS)
    assert report.resumed_bytes >= 10 << 20
    assert report.sent_bytes + report.resumed_bytes == size
    assert_equal(loop, source, s3, step)
    assert loop.run(s3.sweep("")) == []


def test_an_upload_that_the_server_forgot_starts_anew(loop: IoLoop, source: LocalTier, s3: TierPort) -> None:
    step = write_step(source.root, 100, extents=(12_000_000,))

    async def half() -> None:
        from ckptengine.operations.draining.progress import progress_log

        file = step.drain_file()
        upload = await s3.upload(file.name, file.size_bytes, 5 << 20)
        log = progress_log(source, s3, file.name, file.size_bytes)
        log.begun(upload.token, 5 << 20)
        log.part(0, 1, await upload.put(0, b"x" * (5 << 20)))
        await upload.abort()

    loop.run(half())
    report = drain_one(loop, source, s3, step, S3_SETTINGS)
    assert report.resumed_bytes == 0
    assert_equal(loop, source, s3, step)
