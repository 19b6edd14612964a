"""Carry out the batches of a restore from our own format: read, compare every digest, then copy what lay in scratch.

Local files are read in parallel past the page cache, with the CRC taken on the way; what is in the page cache already,
or is wanted by several ranks, is read through it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.errors import NotFound, StorageFailed
from ckptengine.layout.digest import GRANULE_BYTES, combine_granules, raw_to_standard
from ckptengine.operations.filling.batches import Batch, Moved
from ckptengine.operations.filling.whole import WholeBatch
from ckptengine.sources.native import NativeSource
from ckptengine.store.reader import Reader

_WORKERS = 2
"""Batches in flight: one is copied out of scratch while the next is read."""
_THREADS = 4
"""Threads that read one batch."""
_SAMPLES = 8
_NEAR_BYTES = 64 << 10
_GROUP_BYTES = 8 << 20

_UNIT: dict[int, np.dtype[Any]] = {
    size: np.dtype(code) for size, code in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))
}
_Words = npt.NDArray[np.uint64]


class Executor:
    """Fills local memory that the caller keeps alive: ``nbytes[n]`` bytes from ``addresses[n]`` on for target ``n``."""

    def __init__(
        self, source: NativeSource, addresses: Sequence[int], nbytes: Sequence[int], *, shared: bool = False
    ) -> None:
        self._source, self._shared = source, shared
        self._addresses, self._nbytes = addresses, nbytes
        self._thread = threading.local()

    def run(self, batches: Iterable[Batch | WholeBatch]) -> int:
        """Carry out every batch; the bytes that were read.

        Raises `DigestMismatch` naming file, tensor and bytes, and whatever reading raises; some memory is then filled.
        """
        waiting: list[Future[None]] = []
        total = 0
        with ThreadPoolExecutor(_WORKERS, "ckptengine-restore") as pool:
            try:
                for batch in batches:
                    if len(waiting) == 2 * _WORKERS:
                        waiting.pop(0).result()
                    total += batch.read_bytes
                    waiting.append(pool.submit(self._carry_out, batch))
                for future in waiting:
                    future.result()
            finally:
                for future in waiting:
                    future.cancel()
        return total

    def _carry_out(self, batch: Batch | WholeBatch) -> None:
        if isinstance(batch, WholeBatch):
            self._fill_whole(batch)
        else:
            self._fill_parts(batch)

    def _fill_whole(self, batch: WholeBatch) -> None:
        local = self._source.files.local_path(batch.file)
        if local is not None:
            batch.compare(self._source.reader, self._read_local(local, batch.file, batch.ranges, None).ranges)
        elif type(self._source.reader) is Reader:
            batch.compare(self._source.reader, self._read_remote(batch.file, batch.ranges, None)[0])
        else:
            self._read_copies(batch.file, batch.ranges)

    def _fill_parts(self, batch: Batch) -> None:
        scratch = self._scratch(batch.scratch_bytes)
        ranges = np.zeros(len(batch.ranges), native.RANGE)
        ranges["file_offset"] = [one.file_offset for one in batch.ranges]
        ranges["size_bytes"] = [one.nbytes for one in batch.ranges]
        base = scratch.ctypes.data if batch.scratch_bytes else 0
        ranges["address"] = [one.address + base if one.in_scratch else one.address for one in batch.ranges]
        counts = -(-ranges["size_bytes"].astype(np.int64) // GRANULE_BYTES)
        ranges["granule_slot"] = np.cumsum(counts) - counts
        local = self._source.files.local_path(batch.file)
        if local is not None:
            digests = self._read_local(local, batch.file, ranges, int(counts.sum()))
            self._compare(batch, digests.ranges, digests.granules, ranges["granule_slot"])
        elif type(self._source.reader) is Reader:
            self._compare(batch, *self._read_remote(batch.file, ranges, int(counts.sum())), ranges["granule_slot"])
        else:
            self._read_copies(batch.file, ranges)
        for move in batch.moves:
            self._move(scratch, move)

    def _scratch(self, nbytes: int) -> npt.NDArray[np.uint8]:
        held: npt.NDArray[np.uint8] | None = getattr(self._thread, "scratch", None)
        if held is None or held.size < nbytes:
            held = np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)
            self._thread.scratch = held
        return held

    # ---- bytes

    def _read_copies(self, file: str, ranges: npt.NDArray[Any]) -> None:
        """Read through a reader of several copies, which knows where to turn when one is wrong."""
        for offset, nbytes, address, _ in ranges.tolist():
            self._source.read_verified(file, offset, native.memory(address, nbytes).data)

    def _read_local(self, local: str, shown: str, ranges: npt.NDArray[Any], slots: int | None) -> native.ReadDigests:
        """Read and digest ranges, and their granules where there are ``slots`` for them."""
        with contextlib.ExitStack() as stack:
            buffered = _open(stack, local, shown, 0)
            direct, alignment = -1, 512
            if native.available() and not self._shared and not _is_cached(buffered, ranges):
                direct, alignment = _open_direct(stack, local)
            files = native.Files(
                name=f"{self._source.files.root}/{shown}",
                direct=direct,
                buffered=buffered,
                memory_alignment=alignment,
                offset_alignment=alignment,
            )
            granule_bytes = 0 if slots is None else GRANULE_BYTES
            return native.read_ranges(
                files, ranges, threads=_THREADS, granule_bytes=granule_bytes, granule_slots=slots or 0
            )

    def _read_remote(self, file: str, ranges: npt.NDArray[Any], slots: int | None) -> tuple[_Words, _Words]:
        """Raw CRCs per range, and per granule where there are ``slots``; neighbours are read in one request."""
        raws, granules = np.zeros(len(ranges), np.uint64), np.zeros(slots or 0, np.uint64)
        rows: list[tuple[int, int, int, int]] = ranges.tolist()
        for group in _neighbours(rows, np.argsort(ranges["file_offset"], kind="stable").tolist()):
            low, high = rows[group[0]][0], rows[group[-1]][0] + rows[group[-1]][1]
            alone = len(group) == 1
            data = native.memory(rows[group[0]][2], high - low) if alone else np.empty(high - low, "u1")
            self._source.files.read_into(file, low, data.data)
            for i in group:
                offset, nbytes, address, slot = rows[i]
                part = data[offset - low : offset - low + nbytes]
                if not alone:
                    native.memory(address, nbytes)[...] = part
                if slots is None:
                    raws[i] = native.raw_crc64(part)
                    continue
                found = native.raw_granules(part, GRANULE_BYTES)
                granules[slot : slot + len(found)] = found
                raws[i] = combine_granules(found, GRANULE_BYTES, nbytes)
        return raws, granules

    # ---- digests

    def _compare(self, batch: Batch, raws: _Words, granules: _Words, slots: _Words) -> None:
        """Every range against its extent's digest, or its granules against the extent's."""
        reader = self._source.reader
        index = {rank: reader.tail(rank).index for rank in {one.extent[2] for one in batch.ranges}}
        constants: dict[int, int] = {}
        for one, raw, slot in zip(batch.ranges, raws.tolist(), slots.tolist(), strict=True):
            offset, nbytes, rank, row = one.extent
            if one.nbytes == nbytes:
                if nbytes not in constants:
                    constants[nbytes] = raw_to_standard(0, nbytes)
                if raw ^ constants[nbytes] != int(index[rank]["crc"][row]):
                    raise reader.mismatch(rank, row, 0, nbytes)
                continue
            first = (one.file_offset - offset) // GRANULE_BYTES
            count = -(-one.nbytes // GRANULE_BYTES)
            wrong = granules[slot : slot + count] != reader.granules(rank, row)[first : first + count]
            if wrong.any():
                at = (first + int(wrong.argmax())) * GRANULE_BYTES
                raise reader.mismatch(rank, row, at, at + GRANULE_BYTES)

    # ---- copies

    def _move(self, scratch: npt.NDArray[np.uint8], move: Moved) -> None:
        unit = _UNIT[move.item_bytes]
        stored: npt.NDArray[Any] = np.ndarray(
            move.shape, unit, buffer=scratch, offset=move.scratch_start, strides=move.source_strides
        )
        whole = native.memory(self._addresses[move.target], self._nbytes[move.target])
        placed: npt.NDArray[Any] = np.ndarray(
            move.shape, unit, buffer=whole, offset=move.target_start, strides=move.target_strides
        )
        placed[...] = stored


def _neighbours(ranges: Sequence[tuple[int, int, int, int]], order: Sequence[int]) -> Iterator[list[int]]:
    """Ranges, which begin with offset and bytes, that lie close enough together for one request."""
    group: list[int] = []
    low = high = 0
    for i in order:
        start, stop = ranges[i][0], ranges[i][0] + ranges[i][1]
        if group and (start - high > _NEAR_BYTES or stop - low > _GROUP_BYTES):
            yield group
            group = []
        if not group:
            low = start
        group.append(i)
        high = stop
    if group:
        yield group


def _open(stack: contextlib.ExitStack, local: str, shown: str, flags: int) -> int:
    try:
        fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
    except FileNotFoundError:
        raise NotFound(f"{shown} is gone; restore from another copy or an older step") from None
    except OSError as error:
        raise StorageFailed(f"cannot open {shown}: {error.strerror or error}") from error
    stack.callback(os.close, fd)
    return fd


def _open_direct(stack: contextlib.ExitStack, local: str) -> tuple[int, int]:
    """(descriptor, alignment in bytes) for direct reads; (-1, 512) where the file system has none."""
    try:
        fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1, 512
    stack.callback(os.close, fd)
    probe = memoryview(mmap.mmap(-1, 8192))
    for alignment in (512, 4096):
        with contextlib.suppress(OSError):
            os.preadv(fd, [probe[alignment : 2 * alignment]], alignment)
            return fd, alignment
    return -1, 512


def _is_cached(descriptor: int, ranges: npt.NDArray[Any]) -> bool:
    """Whether all of a few sampled pages of the ranges are in the page cache."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    byte = bytearray(1)
    picked = ranges[np.linspace(0, len(ranges) - 1, min(len(ranges), _SAMPLES)).astype(np.int64)]
    places = picked["file_offset"].astype(np.int64)
    if len(places) == 1:
        places = places[0] + np.arange(_SAMPLES) * (int(picked["size_bytes"][0]) // _SAMPLES)
    try:
        return all(os.preadv(descriptor, [byte], int(at), os.RWF_NOWAIT) == 1 for at in places)
    except OSError:
        return False
