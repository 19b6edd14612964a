"""Tensors as streams of row-major bytes in bounded memory: what every writer of plain files needs."""

from __future__ import annotations

import itertools
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.sources import buffers
from ckptengine.sources.direct import BUFFER_BYTES
from ckptengine.sources.writer import Job

READERS = 2
"""While one waits for storage, the other digests what it read."""

BUFFERS = 4
"""Half a chunk each: some are filled while another is written."""

_LARGE_BYTES = 1 << 20
"""Parts from this size on are read and written without a copy where they lie at a page."""


def stream_memory_bytes(job: Job) -> int:
    """What `stream_boxes` needs at most."""
    return BUFFERS * buffer_bytes(job) + READERS * BUFFER_BYTES


def buffer_bytes(job: Job) -> int:
    """Boxes up to this size are handed over in one piece."""
    return max(job.chunk_bytes // 2, 1)


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

    The next parts are read while the last ones are written; small ones share a buffer and a turn of the reader.
    """
    batches = _batches(job, boxes)
    first, second = next(batches, None), next(batches, None)
    if first is not None and second is None:  # a small file: threads and buffers would cost more than it does
        buffer = buffers.take(buffer_bytes(job))
        _hand_over(first, _read(job, first, buffer), write, begin)
        buffers.give(buffer)
    elif first is not None and second is not None:
        _stream(job, itertools.chain([first, second], batches), write, begin)


def _stream(
    job: Job,
    batches: Iterable[list[_Part]],
    write: Callable[[memoryview], None],
    begin: Callable[[int], None],
) -> None:
    free = [buffers.take(buffer_bytes(job)) for _ in range(BUFFERS)]
    waiting: list[tuple[Future[list[memoryview]], list[_Part], mmap.mmap]] = []
    reader = _readers()

    def drain() -> None:
        future, batch, buffer = waiting.pop(0)
        _hand_over(batch, future.result(), write, begin)
        free.append(buffer)

    try:
        for batch in batches:
            if len(waiting) == BUFFERS:
                drain()
            buffer = free.pop()
            waiting.append((reader.submit(_read, job, batch, buffer), batch, buffer))
        while waiting:
            drain()
    finally:
        wait(future for future, _, _ in waiting)
    for buffer in free:
        buffers.give(buffer)


_threads = threading.local()


def _readers() -> ThreadPoolExecutor:
    """The readers of this thread, which live as long as it does: a file is often too small to start some for it."""
    if not hasattr(_threads, "readers"):
        _threads.readers = ThreadPoolExecutor(READERS, thread_name_prefix="ckptengine-read")
    found: ThreadPoolExecutor = _threads.readers
    return found


def _hand_over(
    batch: Sequence[_Part],
    views: Sequence[memoryview],
    write: Callable[[memoryview], None],
    begin: Callable[[int], None],
) -> None:
    for part, view in zip(batch, views, strict=True):
        if part.start is not None:
            begin(part.start)
        write(view)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is read at once of a tensor; ``start`` is the number of the box that begins with it."""

    start: int | None
    name: str
    box: Box
    nbytes: int


def _batches(job: Job, boxes: Iterable[tuple[str, Box]]) -> Iterator[list[_Part]]:
    """Parts in order, as many together as a buffer holds."""
    batch: list[_Part] = []
    held = 0
    room = buffer_bytes(job)
    for number, (name, box) in enumerate(boxes):
        item_bytes = itemsize(job.tensor(name).dtype)
        parts = cut_rows(box, item_bytes, room) if box.size else iter((box,))
        for turn, part in enumerate(parts):
            nbytes = part.size * item_bytes
            if batch and (held + nbytes > room or nbytes >= _LARGE_BYTES):  # begins where it is aligned
                yield batch
                batch, held = [], 0
            batch.append(_Part(number if turn == 0 else None, name, part, nbytes))
            held += nbytes
    if batch:
        yield batch


def _read(job: Job, batch: Sequence[_Part], buffer: mmap.mmap) -> list[memoryview]:
    views: list[memoryview] = []
    position = 0
    for part in batch:
        if part.nbytes <= len(buffer) - position:
            views.append(memoryview(buffer)[position : position + part.nbytes])
        else:  # an element that is larger than a buffer
            views.append(memoryview(bytearray(part.nbytes)))
        position += part.nbytes
    wanted = [(part.name, part.box, view) for part, view in zip(batch, views, strict=True) if part.nbytes]
    if len(wanted) > 1:
        job.read_many(wanted)
    elif wanted:
        job.read(*wanted[0])
    return views


def in_file_order(job: Job, names: Iterable[str]) -> list[str]:
    """Names in the order in which their first bytes lie in the source's files, for targets that have no order."""

    def place(name: str) -> tuple[str, int]:
        fragments = job.tensor(name).fragments
        return (fragments[0].file, fragments[0].offset) if len(fragments) else ("", 0)

    return sorted(names, key=place)


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
