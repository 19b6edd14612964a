"""The portable capture engine: one thread, Python file operations, no compiler needed.

Same walk, same digests and same bytes as the native engine, slower.  Tests inject faults under its `FileOps`.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckptengine import native
from ckptengine.errors import CheckpointError, SaveFailed
from ckptengine.layout.box import Box
from ckptengine.layout.digest import GRANULE_BYTES, combine, shift
from ckptengine.snapshot.port import Digests, Extent, Extents, Progress
from ckptengine.snapshot.streams import current, on
from ckptengine.snapshot.waiting import Waiting
from ckptengine.store.files import FileOps, write_all

CHUNK_BYTES = 4 << 20
CLOSE_S = 5.0
"""How long closing waits for a write in progress."""


_dice = random.Random(0)  # of our own: the module's is part of the training's state


def live_bytes(region: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous CPU tensor, without a copy (shape ``(nbytes,)``); the array keeps the memory alive."""
    if region.numel() == 0:
        return np.empty(0, np.uint8)
    octets: npt.NDArray[np.uint8] = region.detach().reshape(-1).view(torch.uint8).numpy()
    return octets


def _rows(extent: Extent) -> Iterator[tuple[torch.Tensor, Box]]:
    """Cut an extent along its first dimension into parts of about `CHUNK_BYTES`."""
    box = extent.box
    if box.ndim == 0 or box.shape[0] <= 1 or extent.nbytes <= CHUNK_BYTES:
        yield extent.region, box
        return
    rows = max(1, CHUNK_BYTES // (extent.nbytes // box.shape[0]))
    for start in range(0, box.shape[0], rows):
        count = min(rows, box.shape[0] - start)
        part = Box((box.offsets[0] + start, *box.offsets[1:]), (count, *box.shape[1:]))
        yield extent.region[start : start + count], part


def _is_one_run(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box is one contiguous run of its tensor: at most one partial dimension, only ones before it."""
    partial = [d for d in range(box.ndim) if box.shape[d] != shape[d]]
    return not partial or all(box.shape[d] == 1 for d in range(partial[-1]))


class PlainJob:
    """See `WriteJob`."""

    def __init__(self, ops: FileOps, fd: int, path: Path, extents: Extents, begin: int, end: int) -> None:
        self._ops, self._fd, self._path = ops, fd, path
        self._extents = list(extents)
        self._streams = current(extents.regions)
        self._begin, self._end = begin, end
        self._guard = threading.RLock()
        self._changed = Waiting()
        self._pending = deque(range(len(self._extents)))
        self._captured = [False] * len(self._extents)
        self._done = False
        self._stop = False
        self._error: CheckpointError | None = None
        self._captured_bytes = self._written_bytes = self._peak_bytes = 0
        self._events: list[dict[str, Any]] = []
        self._granules: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)] * len(self._extents)
        self._raw = np.zeros(len(self._extents), np.uint64)
        self._contributions = np.zeros(len(self._extents), np.uint64)

    # ---- worker side

    def run(self) -> None:
        """Do the job on the calling thread."""
        try:
            self._fill_gaps()
            with on(self._streams):
                while (extent := self._next()) is not None:
                    self._capture(extent)
        except CheckpointError as error:
            self._error = error
        except BaseException as error:  # a handle never loses an error
            self._error = SaveFailed(f"{self._path}: capture failed: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        self._done = True
        self._changed.notify_all()

    def _next(self) -> int | None:
        with self._guard:
            if self._stop:
                raise SaveFailed(f"{self._path}: the save was cancelled")
            return self._pending.popleft() if self._pending else None

    def _fill_gaps(self) -> None:
        cursor = self._begin
        for extent in self._extents:
            self._zero(cursor, extent.offset)
            cursor = extent.offset + extent.nbytes
        self._zero(cursor, self._end)

    def _zero(self, start: int, stop: int) -> None:
        if stop > start:
            write_all(self._ops, self._fd, bytes(stop - start), start, self._path)

    def _capture(self, number: int) -> None:
        extent = self._extents[number]
        granules: list[npt.NDArray[np.uint64]] = []
        raw, offset = 0, extent.offset
        one_run = _is_one_run(extent.box, extent.global_shape)
        rest = np.empty(0, np.uint8)
        for region, box in _rows(extent):
            if self._stop:
                raise SaveFailed(f"{self._path}: the save was cancelled")
            started_s = time.perf_counter()
            data = live_bytes(region.detach().to("cpu", copy=True).contiguous())
            self._captured_bytes += len(data)
            self._peak_bytes = max(self._peak_bytes, len(data))
            if not one_run:
                self._contributions[number] ^= np.uint64(
                    native.raw_positioned(data, box, extent.global_shape, extent.itemsize)
                )
            raw = combine(raw, native.raw_crc64(data), len(data))
            whole = np.concatenate([rest, data])
            last = offset + len(data) == extent.offset + extent.nbytes
            cut = len(whole) if last else len(whole) - len(whole) % GRANULE_BYTES
            granules.append(native.raw_granules(whole[:cut], GRANULE_BYTES))
            rest = whole[cut:]
            if last:  # digests first: the mutation guard compares with them as soon as the fence lets go
                self._granules[number] = np.concatenate(granules)
                self._raw[number] = raw
                self._mark(number)
            write_all(self._ops, self._fd, data.data, offset, self._path)
            self._written_bytes += len(data)
            offset += len(data)
            self._event(f"extent {number}", started_s, len(data))
        if one_run:
            self._contributions[number] = shift(raw, _bytes_after(extent))

    def _mark(self, number: int) -> None:
        self._captured[number] = True
        self._changed.notify_all()

    def _event(self, name: str, started_s: float, nbytes: int) -> None:
        now_s = time.perf_counter()
        if len(self._events) < 10_000:
            self._events.append(
                {"ph": "X", "name": name, "ts": started_s * 1e6, "dur": (now_s - started_s) * 1e6,
                 "tid": "capture", "args": {"bytes": nbytes}}
            )  # fmt: skip

    # ---- caller side

    def wait_captured(self, extents: Sequence[int] | None = None, timeout_s: float | None = None) -> bool:
        wanted = range(len(self._extents)) if extents is None else extents
        if extents is not None:
            with self._guard:
                urgent = {number for number in extents if not self._captured[number]}
                ahead = [number for number in self._pending if number in urgent]
                self._pending = deque(ahead + [number for number in self._pending if number not in urgent])
        return self._changed.wait_for(lambda: self._done or all(self._captured[n] for n in wanted), timeout_s)

    def wait_written(self, timeout_s: float | None = None) -> bool:
        finished = self._changed.wait_for(lambda: self._done, timeout_s)
        if finished and self._error is not None:
            raise self._error
        return finished

    def recheck(self, extents: Sequence[int], samples: int | None) -> list[int]:
        changed: list[int] = []
        for number in extents:
            kept = self._granules[number]
            if self._error is not None or not len(kept):
                continue
            live = live_bytes(self._extents[number].region.detach().cpu().contiguous())
            count = len(kept) if samples is None else min(samples, len(kept))
            for ordinal in _sampled(count, len(kept)):
                start = int(ordinal) * GRANULE_BYTES
                if native.raw_crc64(live[start : start + GRANULE_BYTES]) != int(kept[ordinal]):
                    changed.append(number)
                    break
        return changed

    def digests(self) -> Digests:
        granules = np.concatenate([np.empty(0, np.uint64), *self._granules])
        return Digests(granules=granules, extents=self._raw, contributions=self._contributions)

    def progress(self) -> Progress:
        return Progress(
            captured_bytes=self._captured_bytes,
            written_bytes=self._written_bytes,
            total_bytes=sum(extent.nbytes for extent in self._extents),
            copied_bytes=self._captured_bytes,
            peak_bytes=self._peak_bytes,
        )

    def trace(self) -> list[dict[str, Any]]:
        return list(self._events)

    def stop(self) -> None:
        self._stop = True

    def cancel(self) -> None:
        self.stop()
        self._changed.wait_for(lambda: self._done)


def _sampled(samples: int, count: int) -> list[int]:
    """The first granule, and one anywhere in every equal part of the rest."""
    if samples == count:
        return list(range(count))
    cuts = [1 + (count - 1) * look // (samples - 1) for look in range(samples)] if samples > 1 else []
    return [0, *(_dice.randrange(low, high) for low, high in itertools.pairwise(cuts))]


def _bytes_after(extent: Extent) -> int:
    """Bytes of the logical tensor behind a box that is one contiguous run of it."""
    first = 0
    for offset, size in zip(extent.box.offsets, extent.global_shape, strict=True):
        first = first * size + offset
    total = 1
    for size in extent.global_shape:
        total *= size
    return (total - first) * extent.itemsize - extent.nbytes


class PlainEngine:
    """See `CaptureEngine`."""

    name = "portable"
    direct = False
    private = True

    def __init__(self, ops: FileOps | None = None) -> None:
        self._ops = ops or FileOps()
        self._jobs: deque[PlainJob] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, fd: int, path: Path, extents: Extents, begin: int, end: int) -> PlainJob:
        job = PlainJob(self._ops, fd, path, extents, begin, end)
        with self._changed:
            if self._closed:
                raise SaveFailed(f"{path}: the engine is closed")
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ckptengine-capture", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return job

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            job.run()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._changed.notify_all()
        for job in jobs:
            job.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)  # a daemon: storage that hangs for ever does not keep the process
