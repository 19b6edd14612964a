"""The native capture engine behind the port: extents as arrays, direct I/O where the file system grants it."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ckptengine import native
from ckptengine.errors import UnusableRequest
from ckptengine.layout.digest import GRANULE_BYTES
from ckptengine.layout.runs import runs_of
from ckptengine.snapshot.port import Digests, Extents, Progress
from ckptengine.snapshot.streams import current

WORKERS = 2
_seeds = itertools.count()


class NativeJob:
    """See `WriteJob`."""

    def __init__(self, job: native.WriteJob, extents: int, direct_fd: int) -> None:
        self._job, self._extents, self._direct_fd = job, extents, direct_fd
        self._guard = threading.Lock()

    def wait_captured(self, extents: Sequence[int] | None = None, timeout_s: float | None = None) -> bool:
        if extents is None:  # nobody's training waits
            return self._job.wait_captured(None, timeout_s, help=False)
        self._job.hurry(extents)
        return self._job.wait_captured(extents, timeout_s)

    def wait_written(self, timeout_s: float | None = None) -> bool:
        try:
            finished = self._job.wait_written(timeout_s)
        except BaseException:
            self._close_direct()
            raise
        if finished:
            self._close_direct()
        return finished

    def _close_direct(self) -> None:
        with self._guard:
            fd, self._direct_fd = self._direct_fd, -1
        if fd >= 0:
            os.close(fd)

    def recheck(self, extents: Sequence[int], samples: int | None) -> list[int]:
        seed = next(_seeds)  # other samples in every save
        return [int(extent) for extent in self._job.recheck(extents, samples=samples or 0, seed=seed)]

    def digests(self) -> Digests:
        return Digests(
            granules=self._job.granules(),
            extents=self._job.extent_digests(),
            contributions=self._job.tensor_contributions(),
        )

    def progress(self) -> Progress:
        now = self._job.progress
        return Progress(
            captured_bytes=now.captured_bytes,
            written_bytes=now.written_bytes,
            total_bytes=now.body_bytes,
            copied_bytes=now.gathered_bytes,
            peak_bytes=now.peak_buffer_bytes,
            starved=now.starved,
        )

    def trace(self) -> list[dict[str, Any]]:
        return [
            {
                "ph": "X",
                "name": native.TRACE_KINDS[int(event["kind"])],
                "ts": int(event["begin_ns"]) / 1e3,
                "dur": int(event["end_ns"] - event["begin_ns"]) / 1e3,
                "tid": f"native {int(event['thread'])}",
                "args": {"bytes": int(event["size_bytes"]), "offset": int(event["file_offset"])},
            }
            for event in self._job.trace()
        ]

    def stop(self) -> None:
        self._job.stop()

    def cancel(self) -> None:
        self._job.cancel()
        self._close_direct()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How much an engine takes, and how far it stays out of the way.

    ``arena_bytes``: all the host memory that it takes, whatever the size of the state.  ``max_bytes_per_s``: a cap on
    writing, None for none (an update that waits lifts it).  ``low_priority``: its threads and their I/O go last.
    """

    arena_bytes: int = 64 << 20
    max_bytes_per_s: int | None = None
    low_priority: bool = False

    def __post_init__(self) -> None:
        if self.arena_bytes < native.SEGMENT_BYTES:
            raise UnusableRequest(f"arena_bytes={self.arena_bytes} is less than one buffer of {native.SEGMENT_BYTES}")
        if self.max_bytes_per_s is not None and self.max_bytes_per_s <= 0:
            raise UnusableRequest(f"max_bytes_per_s={self.max_bytes_per_s} must be above 0")


DEFAULT = EngineSettings()


class NativeEngine:
    """See `CaptureEngine`."""

    name = "native"
    direct = True
    private = False

    def __init__(self, settings: EngineSettings = DEFAULT) -> None:
        self._engine = native.Engine(
            workers=WORKERS,
            buffers=max(2, settings.arena_bytes // native.SEGMENT_BYTES),
            # Else it is pinned with the first tensor on a device, if one ever comes.
            pin=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
            bytes_per_second=settings.max_bytes_per_s or 0,
            io_priority=2 if settings.low_priority else 0,
            niceness=10 if settings.low_priority else 0,
        )
        self._support: dict[int, native.DirectSupport] = {}

    def start(self, fd: int, path: Path, extents: Extents, begin: int, end: int) -> NativeJob:
        table, loops, slots = _table(extents)
        files = self._files(fd, path)
        try:
            job = self._engine.submit(
                files,
                table,
                body=(begin, end),
                loops=loops,
                granule_slots=slots,
                compute_streams=[(int(made.device.index), int(made.cuda_stream)) for made in current(extents.regions)],
                keep=extents.regions,
            )
        except BaseException:
            if files.direct >= 0:
                os.close(files.direct)
            raise
        return NativeJob(job, len(extents), files.direct)

    def _files(self, fd: int, path: Path) -> native.Files:
        device = os.fstat(fd).st_dev
        if device not in self._support:
            self._support[device] = native.probe_direct(str(path.parent))
        support = self._support[device]
        direct = -1
        if support.supported:
            try:
                direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError:
                direct = -1  # refused for this file after all: the buffered descriptor does it
        return native.Files(
            name=str(path),
            direct=direct,
            buffered=fd,
            memory_alignment=support.memory_alignment,
            offset_alignment=support.offset_alignment,
        )

    def close(self) -> None:
        self._engine.close()


def _table(extents: Extents) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    """The extents as the library wants them, their loops, and the number of granules."""
    if "table" not in extents.static:
        extents.static["table"] = _static_table(extents)
    known, loops, granules = extents.static["table"]
    table = known.copy()
    table["file_offset"] = extents.offsets
    table["address"] = [
        address or region.data_ptr() for address, region in zip(extents.addresses, extents.regions, strict=True)
    ]
    return table, loops, granules


def _static_table(extents: Extents) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], int]:
    """All but addresses and file offsets."""
    regions, count = extents.regions, len(extents.regions)
    # Column by column, as if each were one run of memory and all of its tensor: nearly all are.
    table = np.zeros(count, native.EXTENT)
    table["item_bytes"] = [region.element_size() for region in regions]
    table["size_bytes"] = table["run_bytes"] = extents.sizes
    table["device"] = [region.device.index if region.is_cuda else -1 for region in regions]
    granules = -(-np.array(extents.sizes, np.int64) // GRANULE_BYTES)
    table["granule_slot"] = np.cumsum(granules) - granules
    loops: list[tuple[int, int]] = []
    for row, (region, box, shape) in enumerate(zip(regions, extents.boxes, extents.shapes, strict=True)):
        item = region.element_size()
        if not region.is_contiguous():
            table[row]["source_dims_begin"], table[row]["source_dims"] = len(loops), region.dim()
            loops.extend((n, s * item) for n, s in zip(region.shape, region.stride(), strict=True))
        if box.shape != shape:
            runs = runs_of(box, shape)
            table[row]["run_dims_begin"], table[row]["run_dims"] = len(loops), len(runs.loops)
            loops.extend((n, stride * item) for n, stride in runs.loops)
            table[row]["run_bytes"] = runs.length * item
            table[row]["follow_bytes"] = (math.prod(shape) - runs.stop) * item
    return table, np.array(loops, np.int64).reshape(-1, 2), int(granules.sum())
