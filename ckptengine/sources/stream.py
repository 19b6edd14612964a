"""Tensors as streams of row-major bytes in bounded memory: what every writer of plain files needs."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.sources.writer import Job

BUFFERS = 2
"""One is filled while the other is written."""


def stream_memory_bytes(job: Job) -> int:
    """What `stream_boxes` needs at most."""
    return BUFFERS * job.chunk_bytes


def cut_rows(box: Box, item_bytes: int, chunk_bytes: int) -> Iterator[Box]:
    """``box`` as boxes of at most ``chunk_bytes`` (but at least one element), in row-major order."""
    step = max(chunk_bytes // item_bytes, 1)
    if box.size <= step:
        if box.size:
            yield box
        return
    row = 1
    for d in range(box.ndim - 1, -1, -1):
        if row * box.shape[d] > step:
            break
        row *= box.shape[d]
    step -= step % row  # whole rows of the dimensions that fit
    for start in range(0, box.size, step):
        for part in flat_boxes(box.shape, start, min(start + step, box.size)):
            yield part.shift(box.offsets)


def stream_boxes(
    job: Job, boxes: Iterable[tuple[str, Box]], write: Callable[[memoryview], None], begin: Callable[[int], None]
) -> None:
    """Read boxes in order and hand their row-major bytes to ``write``; ``begin(i)`` is called before those of box i.

    The next part is read while the last one is written.
    """
    parts = (
        (number if first else None, name, part)
        for number, (name, box) in enumerate(boxes)
        for first, part in _marked(box, itemsize(job.tensor(name).dtype), job.chunk_bytes)
    )
    free = [mmap.mmap(-1, max(job.chunk_bytes, 1)) for _ in range(BUFFERS)]  # aligned, for reads past the page cache
    waiting: list[tuple[Future[memoryview], mmap.mmap]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="ckptengine-read") as reader:

        def drain() -> None:
            future, buffer = waiting.pop(0)
            write(future.result())
            free.append(buffer)

        starts: list[int | None] = []
        for start, name, part in parts:
            if len(waiting) == BUFFERS:
                _announce(starts.pop(0), begin)
                drain()
            buffer = free.pop()
            starts.append(start)
            waiting.append((reader.submit(_read, job, name, part, buffer), buffer))
        while waiting:
            _announce(starts.pop(0), begin)
            drain()


def _marked(box: Box, item_bytes: int, chunk_bytes: int) -> Iterator[tuple[bool, Box]]:
    """The parts of a box, the first one marked; an empty box is one part."""
    if not box.size:
        yield True, box
        return
    for number, part in enumerate(cut_rows(box, item_bytes, chunk_bytes)):
        yield number == 0, part


def _announce(start: int | None, begin: Callable[[int], None]) -> None:
    if start is not None:
        begin(start)


def _read(job: Job, name: str, part: Box, buffer: mmap.mmap) -> memoryview:
    nbytes = part.size * itemsize(job.tensor(name).dtype)
    view = memoryview(buffer)[:nbytes] if nbytes <= len(buffer) else memoryview(bytearray(nbytes))
    if nbytes:
        job.read(name, part, view)
    return view


def group_by_size(names: Sequence[str], nbytes: Callable[[str], int], most_bytes: int) -> list[list[str]]:
    """Names in order in groups of at most ``most_bytes``; one that is larger is alone."""
    groups: list[list[str]] = []
    room = -math.inf
    for name in names:
        size = nbytes(name)
        if size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(name)
        room -= size
    return groups
