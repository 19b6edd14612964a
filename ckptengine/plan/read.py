"""Who reads what from where: wanted pieces and stored fragments in, ordered byte ranges and strided copies out.

A plan is data.  Whoever executes it reads every range once, in order, and carries out its copies; a read that
`Read.is_direct` goes straight into place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.fragment_index import FragmentIndex
from ckptengine.layout.piece import Piece
from ckptengine.layout.tensor import Fragment

MAX_READ_BYTES = 64 << 20
"""Ranges are cut at this size, so that what a reader buffers is bounded; only overlapping wants join beyond it."""

_JOIN_BYTES = 1 << 20
"""Neighbouring ranges below this size are read together."""
_JOIN_GAP_BYTES = 4096
_SMALL_RUN_BYTES = 8192
_SMALL_GAP_BYTES = 32768
"""Gaps between runs of one copy that are read through: up to this for small runs, an eighth of the run for others."""

Widen = Callable[[Fragment, int, int], tuple[int, int]]
"""The byte range of a fragment's file that must be read for ``[start, stop)`` to be verifiable (whole granules)."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Pieces of one logical tensor that local memory number ``target`` is to be filled with.

    ``fragments`` are the stored ones: all of them, or those that overlap the pieces.
    """

    target: int
    name: str
    shape: tuple[int, ...]
    item_bytes: int
    pieces: Sequence[Piece]
    fragments: Sequence[Fragment]


class Copy(NamedTuple):  # a tuple: there is one per fragment, and a dataclass costs three times as much to make
    """Nested loops of ``shape`` from the bytes of a read to a target, innermost last.

    ``source_start`` counts bytes from the read's first one; ``target_start`` and all strides count elements of
    ``item_bytes``.
    """

    target: int
    item_bytes: int
    shape: tuple[int, ...]
    source_start: int
    source_strides: tuple[int, ...]
    target_start: int
    target_strides: tuple[int, ...]

    @property
    def is_direct(self) -> bool:
        """Whether both sides are one contiguous run."""
        return len(self.shape) <= 1 and self.source_strides in ((), (1,)) and self.target_strides in ((), (1,))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Read:
    """One byte range of one file and what to do with it."""

    file: str
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]

    @property
    def is_direct(self) -> bool:
        """Whether the range is exactly what one contiguous run of one target is filled with."""
        return len(self.copies) == 1 and self.copies[0].is_direct and self.copies[0].nbytes == self.nbytes


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Reads in order of file and offset; none overlap, so that each stored byte is read at most once."""

    reads: tuple[Read, ...]
    wanted_bytes: int
    read_bytes: int

    @property
    def amplification(self) -> float:
        """Bytes read per byte wanted; replicas wanted twice count twice as wanted, so it can be below 1."""
        return self.read_bytes / self.wanted_bytes if self.wanted_bytes else 1.0


def plan_reads(
    wanted: Iterable[Wanted], *, widen: Widen | None = None, max_read_bytes: int = MAX_READ_BYTES
) -> ReadPlan:
    """The plan that fills every wanted element from exactly one stored one.

    `LayoutError`, naming the tensor and the box, for a wanted element with no source or with several.
    """
    by_file: dict[str, list[_Part]] = {}
    wanted_bytes = 0
    for want in wanted:
        for fragment, box, piece in _sources(want):
            wanted_bytes += box.size * want.item_bytes
            parts = _cut(want, fragment, box, piece, max_read_bytes)
            if widen is not None:
                parts = [(*widen(fragment, start, stop), how) for start, stop, how in parts]
            by_file.setdefault(fragment.file, []).extend(parts)
    reads = tuple(read for file in sorted(by_file) for read in _coalesce(file, by_file[file], max_read_bytes))
    return ReadPlan(reads, wanted_bytes, sum(read.nbytes for read in reads))


_Loop = tuple[int, int, int]
"""(count, source stride, target stride), strides in elements."""

_Part = tuple[int, int, tuple[int, int, int, int, list[_Loop]]]
"""(first byte to read, one past the last, (first byte copied, target, item bytes, first target element, loops))."""


def _sources(want: Wanted) -> Iterator[tuple[Fragment, Box, Piece]]:
    """(fragment, what it has of the piece, piece): together exactly the wanted pieces."""
    index: FragmentIndex | None = None
    for piece in want.pieces:
        if piece.size == 0:
            continue
        if len(want.fragments) == 1 and want.fragments[0].box == piece.box:
            yield want.fragments[0], piece.box, piece
            continue
        if index is None:
            index = FragmentIndex(want.fragments)
        found = list(index.overlapping(piece.box))
        if len(found) != 1 or found[0][1] != piece.box:
            _prove(want, piece.box, [common for _, common in found])
        for fragment, common in found:
            yield fragment, common, piece


def _prove(want: Wanted, box: Box, found: list[Box]) -> None:
    try:
        prove_cover(want.name, want.shape, found, within=box)
    except LayoutError as error:
        raise LayoutError(
            f"{error}, so that the wanted box {box} cannot be filled exactly; is a file of the checkpoint missing, "
            "or does it describe another state?"
        ) from None


def _cut(want: Wanted, fragment: Fragment, box: Box, piece: Piece, max_read_bytes: int) -> list[_Part]:
    """The byte ranges that hold ``box``: one where its runs lie close together, one per run where they do not."""
    item = want.item_bytes
    strides = fragment.strides if fragment.strides is not None else row_major_strides(fragment.box.shape)
    source, target = _first(box, fragment.box, strides), piece.start + _first(box, piece.box, piece.strides)
    loops = _loops(box.shape, strides, piece.strides)
    if len(loops) <= 1 and _span(loops) * item <= max_read_bytes and (not loops or loops[0][1] == 1):
        start = fragment.offset + source * item
        return [(start, start + _span(loops) * item, (start, want.target, item, target, loops))]
    parts: list[_Part] = []
    for first, place, inner in _split(loops, source, target, _depth(loops, item), item, max_read_bytes):
        start = fragment.offset + first * item
        parts.append((start, start + _span(inner) * item, (start, want.target, item, place, inner)))
    return parts


def _first(box: Box, outer: Box, strides: Sequence[int]) -> int:
    """The place of the first element of ``box`` among those of ``outer`` laid out by ``strides``."""
    place = 0
    for a, b, stride in zip(box.offsets, outer.offsets, strides, strict=True):
        place += (a - b) * stride
    return place


def _loops(shape: Sequence[int], source: Sequence[int], target: Sequence[int]) -> list[_Loop]:
    """Loops over ``shape``, largest source stride first, joined where both sides go on without a seam."""
    loops = [(n, s, t) for n, s, t in zip(shape, source, target, strict=True) if n > 1]
    if len(loops) > 1:
        loops.sort(key=lambda loop: -loop[1])
        joined = [loops.pop()]
        while loops:
            (n, s, t), (m, u, v) = loops.pop(), joined[-1]
            if s == m * u and t == m * v:
                joined[-1] = n * m, u, v
            else:
                joined.append((n, s, t))
        joined.reverse()
        return joined
    return loops


def _span(loops: Sequence[_Loop]) -> int:
    """Stored elements from the first to the last one touched."""
    span = 1
    for n, s, _ in loops:
        span += (n - 1) * s
    return span


def _depth(loops: Sequence[_Loop], item_bytes: int) -> int:
    """How many outer loops step over gaps that are too wide to read through."""
    block = item_bytes
    depth = 0
    for k in range(len(loops) - 1, -1, -1):
        n, s, _ = loops[k]
        gap = s * item_bytes - block
        if gap > (_SMALL_GAP_BYTES if block < _SMALL_RUN_BYTES else min(block // 8, 2 * _SMALL_GAP_BYTES)):
            depth = max(depth, k + 1)
        block += (n - 1) * s * item_bytes
    return depth


def _split(
    loops: list[_Loop], source: int, target: int, depth: int, item_bytes: int, max_read_bytes: int
) -> Iterator[tuple[int, int, list[_Loop]]]:
    """(first source element, first target element, loops) of parts of at most ``max_read_bytes``, ``depth`` apart."""
    if not loops or (depth <= 0 and _span(loops) * item_bytes <= max_read_bytes):
        yield source, target, loops
        return
    (n, s, t), inner = loops[0], loops[1:]
    together = 1
    if depth <= 0:
        room = max_read_bytes // item_bytes - _span(inner)
        together = 1 + max(room, 0) // s if s else n
    if together == 1:
        for i in range(n):
            yield from _split(inner, source + i * s, target + i * t, depth - 1, item_bytes, max_read_bytes)
        return
    i = 0
    while i < n:
        # Cuts of a run fall on multiples of the largest read, so that two wants of one run are cut alike.
        count = min(together - (source + i) % together if not inner and s == 1 else together, n - i)
        yield source + i * s, target + i * t, [(count, s, t), *inner] if count > 1 else inner
        i += count


def _coalesce(file: str, parts: list[_Part], max_read_bytes: int) -> Iterator[Read]:
    """Reads of one file: overlapping ranges joined always, small neighbours as long as they fit one read."""
    parts.sort(key=itemgetter(0, 1))
    group: list[_Part] = []
    low = high = 0
    for part in parts:
        start, stop = part[0], part[1]
        joins = bool(group) and (
            start < high
            or (
                start <= high + _JOIN_GAP_BYTES
                and stop - start < _JOIN_BYTES
                and (len(group) > 1 or high - low < _JOIN_BYTES)
                and stop - low <= max_read_bytes
            )
        )
        if not joins:
            if group:
                yield _read(file, low, high, group)
            group, low, high = [], start, stop
        group.append(part)
        high = max(high, stop)
    if group:
        yield _read(file, low, high, group)


def _read(file: str, low: int, high: int, group: list[_Part]) -> Read:
    copies: list[Copy] = []
    for _, _, (start, target, item_bytes, place, loops) in group:
        shape, source_strides, target_strides = zip(*loops, strict=True) if loops else ((), (), ())
        copies.append(Copy(target, item_bytes, shape, start - low, source_strides, place, target_strides))
    return Read(file, low, high - low, tuple(copies))
