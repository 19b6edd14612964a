"""The native engine: threads and an arena that carry extents from live memory to a file."""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import SaveFailed, StorageFailed, UnusableRequest
from ckptengine.layout.digest import GRANULE_BYTES, Words
from ckptengine.native.files import Files
from ckptengine.native.library import EXTENT, NO_LOOPS, SEGMENT_BYTES, TRACE, Ids, ids_of, library, octets_of_records

_STATES = ("running", "written", "failed", "cancelled")
_TIMEOUT = 1  # what the library's waits return when time ran out
_SLICE_S = 0.1  # longest wait without looking for signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counters of a job, in bytes and in nanoseconds of `time.monotonic_ns` (0 for what has not happened).

    ``captured_bytes`` of extents are no longer needed in live memory; ``gathered_bytes`` went through the arena;
    ``peak_buffer_bytes`` of the arena were held at most; ``starved``: a fence has waited while no buffer was free.
    """

    body_bytes: int
    captured_bytes: int
    written_bytes: int
    gathered_bytes: int
    peak_buffer_bytes: int
    submitted_ns: int
    captured_ns: int
    written_ns: int
    direct_refused: bool
    starved: bool


class Engine:
    """Threads and an arena that carry write jobs to disk, first come first served.

    ``buffers`` of ``buffer_bytes`` are all the memory it ever takes; ``pin`` page-locks them for CUDA where there is
    one.  ``bytes_per_second`` caps writing (0: no cap; a fence that waits lifts it).  ``io_priority`` is 0 as the
    process, 1 low, 2 idle; ``niceness`` is added to the threads'.  Needs the native library (`UnusableRequest`).

    A forked child cannot use its parent's engine or jobs (`UnusableRequest`, RuntimeError).  Engines are closed at
    interpreter exit.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        buffers: int = 8,
        buffer_bytes: int = SEGMENT_BYTES,
        pin: bool = False,
        bytes_per_second: int = 0,
        io_priority: int = 0,
        niceness: int = 0,
    ) -> None:
        if library is None:
            raise UnusableRequest("the native engine is not available; use the portable one")
        self.buffer_bytes = buffer_bytes
        try:
            self._engine = library.Engine(
                workers=workers,
                buffers=buffers,
                buffer_bytes=buffer_bytes,
                pin=pin,
                bytes_per_second=bytes_per_second,
                io_priority=io_priority,
                niceness=niceness,
            )
        except (RuntimeError, MemoryError) as error:
            raise UnusableRequest(
                f"cannot set up an engine of {workers} threads and {buffers} buffers of {buffer_bytes} bytes: {error}; "
                "ask for fewer or smaller buffers"
            ) from error
        _engines.add(self)

    def submit(
        self,
        files: Files,
        extents: NDArray[Any],
        *,
        body: tuple[int, int],
        loops: NDArray[np.int64] = NO_LOOPS,
        granule_slots: int,
        granule_bytes: int = GRANULE_BYTES,
        reserve_bytes: int = 0,
        order: Ids | None = None,
        compute_streams: Sequence[tuple[int, int]] = (),
        keep: object = None,
    ) -> WriteJob:
        """Start writing file bytes ``body`` = [begin, end) from ``extents`` (of dtype `EXTENT`); the rest is zeros.

        Nothing has been read when it returns.  ``files`` stay open and the extents' memory stays valid until the job
        is written or has stopped; ``keep`` is a reference held for that long.  ``reserve_bytes`` are preallocated, and
        set the file's size, before the first write.  ``order`` names extents to capture first.  ``compute_streams``
        are (device, cudaStream_t) whose present work the copies from that device come after.  ValueError for extents
        that overlap, are out of order or contradict themselves; `UnusableRequest` when the engine is closed, belongs to
        a parent process, or cannot reach a device.
        """
        direct = files.direct >= 0
        try:
            job = self._engine.submit(
                extents=octets_of_records(extents, EXTENT),
                loops=np.ascontiguousarray(loops, np.int64),
                direct=files.direct,
                buffered=files.buffered,
                body_begin=body[0],
                body_end=body[1],
                segment_bytes=min(SEGMENT_BYTES, self.buffer_bytes),
                granule_bytes=granule_bytes,
                granule_slots=granule_slots,
                memory_alignment=files.memory_alignment if direct else 1,
                offset_alignment=files.offset_alignment if direct else 1,
                min_live_bytes=16384,
                reserve_bytes=reserve_bytes,
                order=ids_of(order if order is not None else ()),
                compute_streams=list(compute_streams),
            )
        except RuntimeError as error:
            raise UnusableRequest(f"cannot start writing {files.name}: {error}") from error
        return WriteJob(job, files, keep)

    @property
    def pinned(self) -> bool:
        """Whether the arena is page-locked for CUDA."""
        return bool(self._engine.pinned())

    def close(self) -> None:
        """Cancel every job, wake every waiter, join the threads.  Safe to call twice, and in a forked child."""
        self._engine.close()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    for engine in list(_engines):
        engine.close()


class WriteJob:
    """One rank file's body on its way to disk; made by `Engine.submit`.  Dropping it cancels it.

    Arguments named ``extents`` are indices into the array that was submitted.
    """

    def __init__(self, job: Any, files: Files, keep: object) -> None:
        self._job = job
        self._files = files
        self._keep = keep

    def hurry(self, extents: Sequence[int] | Ids) -> None:
        """A fence has come: capture these extents before everything else, in this order."""
        self._job.hurry(ids_of(extents))

    def wait_captured(
        self, extents: Sequence[int] | Ids | None = None, timeout_s: float | None = None, *, help: bool = True
    ) -> bool:
        """Block until the memory of ``extents`` (default all) may change; False when ``timeout_s`` ran out.

        True also when the job has stopped (see `error`): it reads their memory no more, and its file is void.  With
        ``help``, hurried extents that still wait are copied into free buffers by the calling thread.
        """
        ids = ids_of(extents if extents is not None else ())
        return self._wait(timeout_s, lambda slice_s: self._job.wait_captured(ids, extents is None, help, slice_s))

    def wait_written(self, timeout_s: float | None = None) -> bool:
        """Block until all is handed to the system; False when ``timeout_s`` ran out.  `SaveFailed` when it stopped."""
        if not self._wait(timeout_s, self._job.wait_written):
            return False
        if self.state != "written":
            raise self.error or SaveFailed(f"writing {self._files.name} was cancelled; this save does not exist")
        self._keep = None
        return True

    def _wait(self, timeout_s: float | None, wait: Callable[[float], int]) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _SLICE_S if deadline is None else min(_SLICE_S, max(0.0, deadline - time.monotonic()))
            if wait(left) != _TIMEOUT:
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def sync(self) -> None:
        """Flush a written job's file to stable storage, once; `StorageFailed` stays the job's error."""
        error = self._job.sync()
        if error is not None:
            raise self._failure(*error)

    def cancel(self) -> None:
        """Drop what is not yet written; returns when no thread reads the extents' memory any more."""
        self._job.cancel()
        self._keep = None

    def stop(self) -> None:
        """Drop what is not yet written, and wait for nobody: threads may read the extents' memory for a while."""
        self._job.stop()

    @property
    def state(self) -> str:
        """``running``, ``written``, ``failed`` or ``cancelled``."""
        return _STATES[self._job.state()]

    @property
    def error(self) -> StorageFailed | None:
        """Why the job failed; its first error, kept for ever."""
        error = self._job.error()
        return None if error is None else self._failure(*error)

    def _failure(self, code: int, operation: str, offset: int, message: str) -> StorageFailed:
        failure = StorageFailed(
            f"cannot write {self._files.name} at byte {offset}: {message} (error {code} in {operation}); "
            "this save does not exist, earlier ones are untouched"
        )
        failure.__cause__ = OSError(code, message)
        return failure

    @property
    def progress(self) -> Progress:
        """Counters so far."""
        return Progress(**self._job.progress())

    def captured(self, extent: int) -> bool:
        """Whether one extent's memory may change."""
        return bool(self._job.captured(extent))

    def recheck(self, extents: Sequence[int] | Ids, *, samples: int = 1, seed: int = 0) -> Ids:
        """Which captured extents now differ in live memory from what was captured.

        Digests ``samples`` granules of each again, chosen by ``seed``; 0 for all of them.
        """
        changed: Ids = self._job.recheck(ids_of(extents), samples, seed)
        return changed

    def granules(self) -> Words:
        """uint64[granule_slots]: raw CRC per granule.  Complete once the job is written, as the next two."""
        values: Words = self._job.granules()
        return values

    def extent_digests(self) -> Words:
        """uint64[extents]: raw CRC of each extent's bytes."""
        values: Words = self._job.extent_digests()
        return values

    def tensor_contributions(self) -> Words:
        """uint64[extents]: what each extent adds (xor) to the raw CRC of its logical tensor; 0 without runs."""
        values: Words = self._job.tensor_contributions()
        return values

    def trace(self) -> NDArray[Any]:
        """Events so far (of dtype `TRACE`), at most 16384 of them."""
        events: NDArray[Any] = self._job.trace().view(TRACE)
        return events
