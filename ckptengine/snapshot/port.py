"""The port of capture engines: extents of live memory in, bytes in a rank file and their digests out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch

from ckptengine.layout.box import Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One extent to capture: a region of live memory, its place in the file and in its logical tensor.

    ``region`` is a view of the live tensor that has the shape of ``box``; holding it keeps the memory alive.  Its bytes
    go to ``offset`` of the rank file in row-major order.  ``global_shape`` and ``box`` place it in its logical tensor,
    for the tensor's digest.
    """

    region: torch.Tensor
    offset: int
    nbytes: int
    box: Box
    global_shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return self.region.element_size()


class Extents(Sequence[Extent]):
    """The extents of one rank file as columns: a hundred thousand of them cost no object each.

    ``addresses``: where each lies in host memory, 0 for what is not written straight from there.  ``static``: what an
    engine derived from the columns that do not change between saves, kept for the next one.
    """

    def __init__(self, regions: list[torch.Tensor], boxes: list[Box], shapes: list[tuple[int, ...]]) -> None:
        self.regions, self.boxes, self.shapes = regions, boxes, shapes
        self.sizes = [box.size * region.element_size() for box, region in zip(boxes, regions, strict=True)]
        self.addresses = [direct_address(region) for region in regions]
        self.offsets: Sequence[int] = ()
        self.static: dict[str, Any] = {}

    def at(self, offsets: Sequence[int]) -> Extents:
        """The same extents at these file offsets."""
        placed = copy.copy(self)
        placed.regions = list(self.regions)  # a job keeps its memory alive whatever the next save points at
        placed.offsets = offsets
        return placed

    def point(self, number: int, region: torch.Tensor) -> None:
        """Let one extent read another buffer of the same shape and type."""
        self.regions[number] = region
        self.addresses[number] = direct_address(region)

    def __len__(self) -> int:
        return len(self.regions)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...
    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Extent(
            region=self.regions[index],
            offset=self.offsets[index],
            nbytes=self.sizes[index],
            box=self.boxes[index],
            global_shape=self.shapes[index],
        )


def direct_address(region: torch.Tensor) -> int:
    """Where a region lies as one run of host memory, 0 where it does not."""
    return region.data_ptr() if region.is_cpu and region.is_contiguous() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """What an engine computed on the way, uint64 arrays.

    Raw CRCs of all granules (extents in job order), and per extent its raw CRC and its contribution to the raw CRC of
    its logical tensor.
    """

    granules: npt.NDArray[np.uint64]
    extents: npt.NDArray[np.uint64]
    contributions: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Counters of one job, in bytes; ``peak_bytes`` is the most arena memory it held at once.

    ``starved``: an update has waited for it while the arena was full; never where there is no arena.
    """

    captured_bytes: int
    written_bytes: int
    total_bytes: int
    copied_bytes: int
    peak_bytes: int
    starved: bool = False


class WriteJob(Protocol):
    """One rank file's body being captured and written.  Thread-safe."""

    def wait_captured(self, extents: Sequence[int] | None = None, timeout_s: float | None = None) -> bool:
        """Block until these extents (None: all) no longer read live memory.  False when the time ran out.

        Hurries them: they are captured before anything else.  Returns True as well when the job failed or was cancelled
        (nothing reads live memory then); `wait_written` tells.
        """

    def wait_written(self, timeout_s: float | None = None) -> bool:
        """Block until every byte was handed to the operating system.  Raises the job's `StorageFailed`."""

    def recheck(self, extents: Sequence[int], samples: int | None) -> list[int]:
        """Digest granules again from live memory and return the extents that differ from what was captured.

        ``samples`` granules of each extent (the first one, and others spread over the rest); None: all.
        """

    def digests(self) -> Digests:
        """After `wait_written`."""

    def progress(self) -> Progress: ...

    def trace(self) -> list[dict[str, Any]]:
        """Chrome-trace events (``ph``, ``name``, ``ts``, ``dur`` in microseconds of the monotonic clock, ``tid``)."""

    def stop(self) -> None:
        """The job is void from now on: nothing more is begun.  Waits for nobody; what is under way is finished."""

    def cancel(self) -> None:
        """`stop`, and wait until nothing reads live memory or writes any more."""


class CaptureEngine(Protocol):
    """Starts jobs; one per process, with a bounded arena that all jobs share."""

    name: str
    direct: bool
    """Whether large extents should be placed congruent to their memory addresses."""

    def start(self, fd: int, path: Path, extents: Extents, begin: int, end: int) -> WriteJob:
        """Capture ``extents`` (sorted by offset, disjoint) into bytes [begin, end) of the file; gaps become zeros.

        Returns at once; jobs run in order.  ``fd`` stays the caller's and must outlive the job.
        """

    def close(self) -> None:
        """Cancel what runs, join threads, free the arena."""

    @property
    def private(self) -> bool:
        """Whether it belongs to one checkpointer, which closes it."""
