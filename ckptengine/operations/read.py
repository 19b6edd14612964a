"""Fill a box of a logical tensor from the fragments that hold it: the one executor behind every reading verb.

Bytes only: elements are moved as opaque units of their size, so every dtype (bfloat16 and float8 too) is the same.

Three steps.  *Intersect* the wanted box with the fragments and prove that they cover it exactly.  *Plan*: cut each part
into pieces whose bytes lie close together in a file, merge what is adjacent, read straight into the target where both
sides are contiguous and through a bounded scratch buffer where they are not.  *Execute* on a few threads where there is
enough to read.  Memory beside the target is at most ``workers * SCRATCH_BYTES``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.errors import DigestMismatch, LayoutError, UnusableRequest
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.digest import format_digest, raw_to_standard
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources import buffers
from ckptengine.sources.port import Files, Verifying

SCRATCH_BYTES = 4 << 20
"""Largest buffer that a worker reads into where the target is not contiguous."""

BLOCK_BYTES = 8 << 20
"""Largest single read straight into a target: what a large read is cut into for the workers."""

GAP_BYTES = 4096
"""Bytes that are read and thrown away rather than starting another read: a page costs no extra I/O."""

PARALLEL_BYTES = 32 << 20
"""From here on a read uses several threads."""

_UNIT: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("u2"),
    4: np.dtype("u4"),
    8: np.dtype("u8"),
    16: np.dtype("V16"),
}

Array = npt.NDArray[Any]


ReadInto = Callable[[str, int, memoryview], None]
"""Fills a view from (path, offset): `Files.read_into` or `Verifying.read_verified`."""


class HasFiles(Protocol):
    """All that reading needs of a source; one that is `Verifying` too has its bytes checked on the way."""

    @property
    def files(self) -> Files: ...


class FindsFragments(Protocol):
    """Fragments that can be found by box without listing all of them."""

    def overlapping(self, box: Box) -> Iterable[Fragment]:
        """The fragments that share an element with ``box``."""
        ...


def read_box(
    source: HasFiles,
    tensor: LogicalTensor,
    box: Box,
    out: Array | memoryview | bytearray,
    *,
    workers: int | None = None,
) -> None:
    """Fill ``out`` with the elements of ``box``; see `BoxReader.read`."""
    BoxReader(source, tensor).read(box, out, workers=workers)


def read_tensor(source: HasFiles, tensor: LogicalTensor, *, workers: int | None = None) -> Array:
    """The whole tensor as an array of opaque units of the element size (``u1``, ``u2``, ``u4``, ``u8`` or ``V16``)."""
    out = np.empty(tensor.shape, _UNIT[itemsize(tensor.dtype)])
    read_box(source, tensor, Box.whole(tensor.shape), out, workers=workers)
    return out


def default_workers() -> int:
    """Threads that one large read uses: reads wait for storage more than for a core."""
    return min(8, 2 + len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


class BoxReader:
    """Reads boxes of one tensor; indexes its fragments once, so that many boxes of many fragments stay cheap."""

    def __init__(self, source: HasFiles, tensor: LogicalTensor, *, read_into: ReadInto | None = None) -> None:
        """``read_into`` replaces the source's own way of reading, its verification included."""
        self.tensor = tensor
        self.item_bytes = itemsize(tensor.dtype)
        # Asking for the method is a hundred times as fast as asking a Protocol, and there are 100,000 tensors.
        verified: ReadInto | None = getattr(source, Verifying.read_verified.__name__, None)
        self._read_into: ReadInto = read_into or verified or source.files.read_into
        self._checks_whole = tensor.digest is not None and self._read_into == source.files.read_into
        self._overlapping: Callable[[Box], Iterable[Fragment]] = getattr(
            tensor.fragments, FindsFragments.overlapping.__name__, self._search
        )
        self._corners: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def _search(self, box: Box) -> Iterable[Fragment]:
        """The fragments that may share elements with ``box``, for a source that has no index of its own."""
        fragments = self.tensor.fragments
        if len(fragments) == 1:
            return fragments
        if self._corners is None:
            count, ndim = len(fragments), len(self.tensor.shape)
            starts = np.fromiter((o for f in fragments for o in f.box.offsets), np.int64, count * ndim)
            ends = np.fromiter((e for f in fragments for e in f.box.ends), np.int64, count * ndim)
            self._corners = starts.reshape(count, ndim), ends.reshape(count, ndim)
        starts, ends = self._corners
        hit = ((starts < np.array(box.ends)) & (ends > np.array(box.offsets))).all(axis=1)
        return (fragments[position] for position in np.flatnonzero(hit).tolist())

    def parts(self, box: Box) -> list[Fragment]:
        """The fragments cut to ``box``, in no particular order.

        Raises `LayoutError` where they do not hold each of its elements exactly once.
        """
        name, shape = self.tensor.name, self.tensor.shape
        if box.ndim != len(shape) or any(end > extent for end, extent in zip(box.ends, shape, strict=True)):
            raise UnusableRequest(f"box {box} is not inside tensor {name!r} of shape {shape}; ask for a smaller box")
        if box.size == 0:
            return []
        found: list[Fragment] = []
        for fragment in self._overlapping(box):
            common = fragment.box.intersect(box)
            if common is not None:
                found.append(fragment if common == fragment.box else fragment.part(common, self.item_bytes))
        held = sum(part.box.size for part in found)
        if held != box.size:
            what = "leave a gap" if held < box.size else "overlap"
            raise LayoutError(
                f"tensor {name!r} of shape {shape}: its {len(found)} fragments in box {box} hold {held} elements where "
                f"{box.size} are wanted: they {what}; is a file of the checkpoint missing or from another run?"
            )
        if len(found) > 1:
            prove_cover(name, box.shape, [part.box.relative_to(box) for part in found])
        return found

    def read(self, box: Box, out: Array | memoryview | bytearray, *, workers: int | None = None) -> None:
        """Fill ``out`` with the elements of ``box``, row-major.

        ``out`` is an array of the box's shape and the tensor's element size (any strides, any dtype), or a writable
        contiguous buffer of exactly that many bytes.  ``workers`` bounds the threads (None: chosen by size).
        Raises `UnusableRequest` for a target that does not fit, `LayoutError` where fragments do not cover the box,
        `DigestMismatch` where all of a tensor is read whose digest is recorded and whose source verifies nothing, and
        what the source raises for files that are short, damaged or gone; ``out`` is then partly filled.
        """
        target = _Target(self.tensor, box, out)
        parts = self.parts(box)
        pieces = [piece for part in parts for piece in _cut(part, target)]
        tasks = list(_tasks(pieces))
        total = sum(task.span_bytes for task in tasks)
        threads = workers if workers is not None else (default_workers() if total >= PARALLEL_BYTES else 1)
        _execute(self._read_into, tasks, target, max(1, min(threads, len(tasks))))
        if self._checks_whole and box.shape == self.tensor.shape and target.flat is not None:
            self._check(target.flat)

    def _check(self, data: memoryview) -> None:
        found = format_digest(raw_to_standard(native.raw_crc64(data), len(data)))
        if found != self.tensor.digest:
            raise DigestMismatch(
                f"tensor {self.tensor.name!r} reads as {found}, written was {self.tensor.digest}; take another copy"
            )


class _Target:
    """Where elements go: an array of opaque units, and its flat bytes where it is contiguous."""

    def __init__(self, tensor: LogicalTensor, box: Box, out: Array | memoryview | bytearray) -> None:
        self.box = box
        self.item_bytes = itemsize(tensor.dtype)
        unit = _UNIT[self.item_bytes]
        if isinstance(out, np.ndarray):
            if out.shape != box.shape or out.itemsize != self.item_bytes or not out.flags.writeable:
                raise UnusableRequest(
                    f"reading {tensor.name!r}: the target has shape {out.shape}, {out.itemsize} bytes per element and "
                    f"writeable={out.flags.writeable}; wanted is shape {box.shape} with {self.item_bytes}, writeable"
                )
            self.units = out.view(unit)
        else:
            view = memoryview(out)
            if not view.c_contiguous or view.readonly or view.nbytes != box.size * self.item_bytes:
                raise UnusableRequest(
                    f"reading {tensor.name!r}: the target buffer has {view.nbytes} bytes; wanted is a writable "
                    f"contiguous one of {box.size * self.item_bytes}"
                )
            self.units = np.frombuffer(view, dtype=unit).reshape(box.shape)
        flat = self.units.reshape(-1).view(np.uint8) if self.units.flags.c_contiguous and self.units.size else None
        self.flat: memoryview | None = None if flat is None else flat.data
        self._strides = row_major_strides(box.shape)

    def run_offset(self, box: Box) -> int | None:
        """Byte offset in the target of ``box`` where it is one contiguous run there, else None."""
        if self.flat is None:
            return None
        dense = True  # everything to the right of the current dimension is taken whole
        for extent, whole in zip(reversed(box.shape), reversed(self.box.shape), strict=True):
            if not dense and extent != 1:
                return None
            dense = dense and extent == whole
        inner = box.relative_to(self.box).offsets
        return self.item_bytes * sum(o * s for o, s in zip(inner, self._strides, strict=True))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes ``offset .. offset + span_bytes`` of a file and where their elements go.

    ``run`` is the byte offset in the flat target where both sides are contiguous; otherwise elements are copied from
    ``strides_bytes`` to ``box`` of the target.
    """

    file: str
    offset: int
    span_bytes: int
    run: int | None
    box: Box
    strides_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Task:
    """One read: straight into the target at ``run``, or into scratch and from there piece by piece."""

    file: str
    offset: int
    span_bytes: int
    run: int | None
    pieces: tuple[_Piece, ...]


def _cut(part: Fragment, target: _Target) -> Iterator[_Piece]:
    """Cut a part into pieces that are read whole: contiguous on both sides, or dense enough and small enough."""
    item = target.item_bytes
    strides = part.strides if part.strides is not None else row_major_strides(part.box.shape)
    if part.is_contiguous:
        run = target.run_offset(part.box)
        if run is not None:
            yield _Piece(part.file, part.offset, part.box.size * item, run, part.box, ())
            return
    span = part.span_elements() * item
    widest = _widest(part.box.shape, strides)
    inner = (span - (part.box.shape[widest] - 1) * strides[widest] * item) if widest is not None else span
    gap = strides[widest] * item - inner if widest is not None else 0
    if widest is None or (span <= SCRATCH_BYTES and gap <= GAP_BYTES):
        strides_bytes = tuple(s * item for s in strides)
        yield _Piece(part.file, part.offset, span, None, part.box, strides_bytes)
        return
    per_piece = 1 if gap > GAP_BYTES else max(1, (SCRATCH_BYTES - inner) // (strides[widest] * item) + 1)
    extent, first = part.box.shape[widest], part.box.offsets[widest]
    if inner > SCRATCH_BYTES:
        per_piece = 1
    for start in range(0, extent, per_piece):
        wanted = Box(
            (*part.box.offsets[:widest], first + start, *part.box.offsets[widest + 1 :]),
            (*part.box.shape[:widest], min(per_piece, extent - start), *part.box.shape[widest + 1 :]),
        )
        yield from _cut(part.part(wanted, item), target)


def _widest(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The dimension with the largest non-zero stride among those with more than one element."""
    candidates = [d for d in range(len(shape)) if shape[d] > 1 and strides[d] > 0]
    return max(candidates, key=lambda d: strides[d]) if candidates else None


def _tasks(pieces: list[_Piece]) -> Iterator[_Task]:
    """Merge pieces that are neighbours in a file, then cut long direct runs into blocks."""
    pieces.sort(key=lambda p: (p.file, p.offset))
    for file, same_file in groupby(pieces, key=lambda p: p.file):
        group: list[_Piece] = []
        start = end = 0
        for piece in _join_runs(same_file):
            long = piece.run is not None and piece.span_bytes > GAP_BYTES
            far = piece.offset - end > GAP_BYTES or piece.offset + piece.span_bytes - start > SCRATCH_BYTES
            if group and (long or far):
                yield _grouped(file, start, end, group)
                group = []
            if long:
                yield from _blocks(piece)
                continue
            if not group:
                start = end = piece.offset
            group.append(piece)
            end = max(end, piece.offset + piece.span_bytes)
        if group:
            yield _grouped(file, start, end, group)


def _join_runs(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """Join direct runs that follow each other both in the file and in the target."""
    held: _Piece | None = None
    for piece in pieces:
        if (
            held is not None
            and held.run is not None
            and piece.run is not None
            and held.offset + held.span_bytes == piece.offset
            and held.run + held.span_bytes == piece.run
        ):
            held = _Piece(held.file, held.offset, held.span_bytes + piece.span_bytes, held.run, held.box, ())
            continue
        if held is not None:
            yield held
        held = piece
    if held is not None:
        yield held


def _grouped(file: str, start: int, end: int, group: list[_Piece]) -> _Task:
    if len(group) == 1 and group[0].run is not None:
        return _Task(file, start, end - start, group[0].run, ())
    return _Task(file, start, end - start, None, tuple(group))


def _blocks(piece: _Piece) -> Iterator[_Task]:
    assert piece.run is not None
    for start in range(0, piece.span_bytes, BLOCK_BYTES):
        size = min(BLOCK_BYTES, piece.span_bytes - start)
        yield _Task(piece.file, piece.offset + start, size, piece.run + start, ())


def _execute(read_into: ReadInto, tasks: list[_Task], target: _Target, workers: int) -> None:
    if workers == 1:
        _run_tasks(read_into, tasks, target)
        return
    # Threads take contiguous stretches in small turns, so that each reads forward and none is left with all the work.
    turn = iter(tasks)
    lock = threading.Lock()
    stopped = threading.Event()

    def next_tasks() -> Iterator[_Task]:
        while not stopped.is_set():
            with lock:
                task = next(turn, None)
            if task is None:
                return
            yield task

    def work() -> None:
        try:
            _run_tasks(read_into, next_tasks(), target)
        except BaseException:
            stopped.set()
            raise

    _join_all([work] * workers)


def _join_all(jobs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(jobs), thread_name_prefix="ckptengine-read") as pool:
        futures = [pool.submit(job) for job in jobs]
    for future in futures:
        future.result()


def _run_tasks(read_into: ReadInto, tasks: Iterable[_Task], target: _Target) -> None:
    scratch = np.empty(0, np.uint8)
    for task in tasks:
        if task.run is not None:
            assert target.flat is not None
            read_into(task.file, task.offset, target.flat[task.run : task.run + task.span_bytes])
            continue
        if scratch.size < task.span_bytes:
            scratch = np.empty(max(task.span_bytes, min(2 * scratch.size, SCRATCH_BYTES)), np.uint8)
        read_into(task.file, task.offset, scratch.data[: task.span_bytes])
        for piece in task.pieces:
            _scatter(scratch, piece, piece.offset - task.offset, target)


def _scatter(scratch: npt.NDArray[np.uint8], piece: _Piece, at: int, target: _Target) -> None:
    if piece.run is not None:
        assert target.flat is not None
        flat = target.flat[piece.run : piece.run + piece.span_bytes]
        buffers.copy(flat, scratch.data[at : at + piece.span_bytes])
        return
    stored: Array = np.ndarray(
        piece.box.shape, target.units.dtype, buffer=scratch, offset=at, strides=piece.strides_bytes
    )
    inner = piece.box.relative_to(target.box)
    index = tuple(slice(o, o + n) for o, n in zip(inner.offsets, inner.shape, strict=True))
    target.units[index] = stored
