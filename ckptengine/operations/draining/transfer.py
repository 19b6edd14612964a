"""Carrying one file from tier to tier: parts in parallel, memory bounded, resumed where it broke off, proven equal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from ckptengine import native
from ckptengine.errors import AlreadyExists, DigestMismatch, NotFound, StorageFailed, Truncated
from ckptengine.layout.digest import combine, format_digest, parse_digest, raw_to_standard
from ckptengine.operations.draining.progress import ProgressLog, Sent, progress_log
from ckptengine.operations.draining.rank_digest import rank_file_digest
from ckptengine.store import names
from ckptengine.store.manifest import FileRecord
from ckptengine.tiers.port import TierPort, Upload

log = logging.getLogger("ckptengine")

_MEBIBYTE = 1 << 20
_MAX_PARTS = 10_000
_GRACE_S = 10.0
"""How long parts that are on their way may go on after another one has failed."""


@dataclass(frozen=True, slots=True)
class DrainFile:
    """A file to carry: ``digest`` is ``"crc64nvme:..."`` of all its bytes, or None where nothing is known of them.

    ``record``: what the manifest says of a rank file; its digest is then found out, before anything is sent, from its
    own index.  ``is_there``: it lies on the target alone, where it is only proven.
    """

    name: str
    size_bytes: int
    digest: str | None = None
    record: FileRecord | None = None
    is_there: bool = False


@dataclass(slots=True)
class Moved:
    """Bytes that went over the wire, that had gone before, and that were read back to prove them."""

    sent_bytes: int = 0
    resumed_bytes: int = 0
    read_back_bytes: int = 0


class Budget:
    """At most ``limit_bytes`` and ``limit_parts`` in memory at once; one part larger than the limit goes alone."""

    def __init__(self, limit_bytes: int, limit_parts: int) -> None:
        self._limit_bytes = limit_bytes
        self.limit_parts = limit_parts
        self._used_bytes = 0
        self._used_parts = 0
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, size_bytes: int) -> AsyncIterator[None]:
        async with self._freed:
            await self._freed.wait_for(lambda: self._fits(size_bytes))
            self._used_bytes += size_bytes
            self._used_parts += 1
        try:
            yield
        finally:
            async with self._freed:
                self._used_bytes -= size_bytes
                self._used_parts -= 1
                self._freed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        fits = self._used_bytes + size_bytes <= self._limit_bytes and self._used_parts < self.limit_parts
        return fits or self._used_parts == 0


class Throttle:
    """A cap in bytes per second over everything that goes through it; None lets everything through."""

    def __init__(self, max_bytes_per_s: float | None) -> None:
        self._rate = max_bytes_per_s
        self._free_at_s = 0.0

    async def take(self, size_bytes: int) -> None:
        """Return when ``size_bytes`` more may go."""
        if self._rate is None:
            return
        now_s = asyncio.get_running_loop().time()
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + size_bytes / self._rate
        await asyncio.sleep(self._free_at_s - now_s)


@dataclass(slots=True)
class Transfer:
    """One file on its way.  Run it once."""

    source: TierPort
    target: TierPort
    file: DrainFile
    part_bytes: int
    budget: Budget
    throttle: Throttle
    on_bytes: Callable[[int], None] = lambda _: None
    moved: Moved = field(default_factory=Moved)

    async def run(self) -> Moved:
        """Have the file on the target, published, durable and equal.

        Raises `Damaged` where the source's bytes are not what their digest says (nothing is published then),
        `StorageFailed` where either side refuses, `DigestMismatch` where the target twice gave back other bytes.
        """
        notes = progress_log(self.source, self.target, self.file.name, self.file.size_bytes)
        if self.file.record is not None:
            digest = await rank_file_digest(self.source, self.file.name, self.file.record)
            self.file = replace(self.file, digest=digest)
        for attempt in range(2):
            sent = notes.load()
            if await self._is_there_already(sent, notes):
                return self.moved
            try:
                await self._send(sent, notes)
                notes.verified()
                return self.moved
            except _ArrivedFirst as first:
                # Perhaps another process carries the same step: then the next round finds equal bytes there.
                if attempt:
                    raise AlreadyExists(str(first)) from None
            except _ArrivedOther as other:
                await self._remove_uncommitted(notes)
                if attempt:
                    raise DigestMismatch(str(other)) from None
        raise AssertionError("the loop returns or raises")

    async def _is_there_already(self, sent: Sent, notes: ProgressLog) -> bool:
        entry = await self.target.stat(self.file.name)
        if entry is None:
            return False
        if entry.size_bytes == self.file.size_bytes and (sent.verified or await self._equals_source()):
            self._count(resumed=self.file.size_bytes)
            notes.verified()
            return True
        await self._remove_uncommitted(notes)
        return False

    async def _remove_uncommitted(self, notes: ProgressLog) -> None:
        """Make way for sending the file again: its name is this save's alone, but a manifest may already need it."""
        folder, _, base = self.file.name.rpartition("/")
        rank = names.RANK_PATTERN.match(base)
        manifest = f"{folder}/{names.manifest(int(rank[2]), int(rank[3]))}" if rank else None
        if manifest is not None and await self.target.stat(manifest) is not None:
            raise DigestMismatch(
                f"{self._where()} is part of a committed checkpoint and differs from {self.source.label}'s; "
                f"one of the two is damaged: verify both, and prune the damaged one"
            )
        await self.target.delete(self.file.name)
        notes.forget()

    async def _equals_source(self) -> bool:
        """Whether the object that is there has the source's bytes; `DigestMismatch` where the source is damaged."""
        sent = Sent(part_bytes=self._part_bytes())
        different: list[int] = []

        async def compare(part: int) -> None:
            ours = await self._read(self.source, part, sent)
            sent.crcs[part] = await asyncio.to_thread(native.raw_crc64, ours)
            del ours
            theirs = await self._read(self.target, part, sent)
            self.moved.read_back_bytes += len(theirs)
            if await asyncio.to_thread(native.raw_crc64, theirs) != sent.crcs[part]:
                different.append(part)

        await self._each(range(self._count_parts(sent)), compare)
        self._check_digest(sent)
        return not different

    async def _send(self, sent: Sent, notes: ProgressLog) -> None:
        upload, sent = await self._begin(sent, notes)
        published = False
        try:
            todo = [part for part in range(self._count_parts(sent)) if part not in sent.receipts]
            self._count(resumed=sum(self._length(part, sent) for part in sent.receipts))
            await self._each(todo, lambda part: self._send_part(part, upload, sent, notes))
            try:
                self._check_digest(sent)
            except DigestMismatch:
                notes.forget()
                await _tidy(upload.abort())
                raise
            try:
                await upload.finish(sent.receipts)
            except AlreadyExists:
                await _tidy(upload.abort())
                raise _ArrivedFirst(f"{self._where()} was published by somebody else while it was being sent") from None
            published = True
        finally:
            if not published:
                await _tidy(upload.release())
        await self._verify_arrival(sent)

    async def _begin(self, sent: Sent, notes: ProgressLog) -> tuple[Upload, Sent]:
        name, size_bytes = self.file.name, self.file.size_bytes
        if sent.token and sent.part_bytes:
            try:
                return await self.target.upload(name, size_bytes, sent.part_bytes, sent.token), sent
            except NotFound:
                notes.forget()
        fresh = Sent(part_bytes=self._part_bytes())
        upload = await self.target.upload(name, size_bytes, fresh.part_bytes)
        fresh.token = upload.token
        if upload.token:
            notes.begun(upload.token, fresh.part_bytes)
        return upload, fresh

    async def _send_part(self, part: int, upload: Upload, sent: Sent, notes: ProgressLog) -> None:
        length = self._length(part, sent)
        data = await self._read(self.source, part, sent)
        crc = await asyncio.to_thread(native.raw_crc64, data)
        await self.throttle.take(length)
        receipt = await upload.put(part, data)
        sent.receipts[part], sent.crcs[part] = receipt, crc
        if upload.token:
            notes.part(part, crc, receipt)
        self.moved.sent_bytes += length
        self.on_bytes(length)

    async def _verify_arrival(self, sent: Sent) -> None:
        """Read back what the target did not prove by itself."""
        entry = await self.target.stat(self.file.name)
        if entry is None or entry.size_bytes != self.file.size_bytes:
            found = "is not there" if entry is None else f"has {entry.size_bytes} bytes"
            raise _ArrivedOther(f"{self._where()} {found} after {self.file.size_bytes} bytes were sent")

        async def check(part: int) -> None:
            try:
                data = await self._read(self.target, part, sent)
            except Truncated as short:
                raise _ArrivedOther(str(short)) from None
            crc = await asyncio.to_thread(native.raw_crc64, data)
            self.moved.read_back_bytes += len(data)
            if crc != sent.crcs[part]:
                raise _ArrivedOther(
                    f"{self._where()}: part {part} of {sent.part_bytes} bytes does not hold what was sent; "
                    f"check the storage and the network"
                )

        await self._each([part for part, receipt in sorted(sent.receipts.items()) if not receipt.proven], check)

    async def _each(self, parts: Iterable[int], work: Callable[[int], Awaitable[None]]) -> None:
        """``work`` on every part, several at once; after an error no further part is begun, and it is raised.

        A worker gets its memory before it takes the next part, so that the lowest parts never wait for higher ones:
        a tier that takes parts in order only would be stuck otherwise.
        """
        waiting = iter(parts)
        stop = asyncio.Event()

        async def worker() -> None:
            while not stop.is_set():
                async with self.budget.hold(self._part_bytes()):
                    part = None if stop.is_set() else next(waiting, None)
                    if part is None:
                        return
                    try:
                        await work(part)
                    except BaseException:
                        stop.set()
                        raise

        workers = [asyncio.create_task(worker()) for _ in range(self.budget.limit_parts)]
        try:
            _, running = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            if running:
                # What is on its way may still arrive, and need not be sent again then.
                await asyncio.wait(running, timeout=_GRACE_S)
        finally:
            for task in workers:
                task.cancel()
            outcomes = await asyncio.gather(*workers, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def _check_digest(self, sent: Sent) -> None:
        if self.file.digest is None:
            return
        raw = 0
        for part in range(self._count_parts(sent)):
            raw = combine(raw, sent.crcs[part], self._length(part, sent))
        found = raw_to_standard(raw, self.file.size_bytes)
        if found != parse_digest(self.file.digest):
            raise DigestMismatch(
                f"{self.source.label}/{self.file.name} has digest {format_digest(found)}, but {self.file.digest} was "
                f"written; it is damaged and is not carried on: save again, or use another copy"
            )

    async def _read(self, tier: TierPort, part: int, sent: Sent) -> bytes:
        return await tier.read(self.file.name, part * sent.part_bytes, self._length(part, sent))

    def _part_bytes(self) -> int:
        least = -(-self.file.size_bytes // _MAX_PARTS)
        return self.part_bytes if least <= self.part_bytes else -(-least // _MEBIBYTE) * _MEBIBYTE

    def _count_parts(self, sent: Sent) -> int:
        return -(-self.file.size_bytes // sent.part_bytes)

    def _length(self, part: int, sent: Sent) -> int:
        return min(sent.part_bytes, self.file.size_bytes - part * sent.part_bytes)

    def _count(self, *, resumed: int) -> None:
        self.moved.resumed_bytes += resumed
        self.on_bytes(resumed)

    def _where(self) -> str:
        return f"{self.target.label}/{self.file.name}"


async def _tidy(work: Awaitable[None]) -> None:
    """Where this fails, something is left that is swept later; what went wrong before is what counts."""
    try:
        await work
    except StorageFailed as failure:
        log.warning("an unfinished upload may be left: %s", failure)


class _ArrivedOther(Exception):
    """What lies on the target is not what was sent."""


class _ArrivedFirst(Exception):
    """The name was taken while the file was being sent."""
