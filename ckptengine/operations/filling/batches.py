"""Planned reads cut into batches: byte ranges with their destinations, what must match, what is copied afterwards.

A run that is whole granules goes straight into its tensor; the granules at its ends, and everything strided, go through
scratch memory, of which a batch needs a bounded amount.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptengine.layout.digest import GRANULE_BYTES
from ckptengine.plan.read import Copy, Read

SCRATCH_BYTES = 16 << 20
BATCH_BYTES = 128 << 20
_SPLIT_BYTES = 4 * GRANULE_BYTES
"""Runs from this size on go straight into place but for the granules at their ends."""

Row = tuple[int, int, int, int]
"""(first byte in the file, bytes, rank, row of the rank's index) of an extent."""


class Range(NamedTuple):
    """Whole granules of one extent.  ``address`` is memory, or an offset in the batch's scratch."""

    file_offset: int
    nbytes: int
    address: int
    in_scratch: bool
    extent: Row


class Moved(NamedTuple):
    """Nested loops from a batch's scratch into target number ``target``; all but ``item_bytes`` and counts in bytes."""

    scratch_start: int
    target: int
    item_bytes: int
    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_start: int
    target_strides: tuple[int, ...]


@dataclass(slots=True)
class Batch:
    """Ranges of one file and what follows them."""

    file: str
    ranges: list[Range] = field(default_factory=list)
    moves: list[Moved] = field(default_factory=list)
    scratch_bytes: int = 0
    read_bytes: int = 0

    def into_scratch(self, low: int, high: int, extent: Row) -> int:
        """Read ``[low, high)`` into fresh scratch; where that begins."""
        start = self.scratch_bytes
        # Congruent to the file modulo a page, so that direct reads need no second copy.
        start += (low - start) % 4096
        self.ranges.append(Range(low, high - low, start, True, extent))
        self.scratch_bytes = start + high - low
        return start


def batches_of(
    reads: Sequence[Read], extents: Mapping[str, Sequence[Row]], addresses: Sequence[int]
) -> Iterator[Batch]:
    """Cut ``reads``, which are in order of file and offset; ``addresses[n]`` is where target ``n`` begins."""
    batch: Batch | None = None
    rows: Sequence[Row] = ()
    starts: list[int] = []
    for read in reads:
        if batch is None or batch.file != read.file:
            if batch is not None:
                yield batch
            batch, rows = Batch(read.file), extents[read.file]
            starts = [row[0] for row in rows]
        elif batch.scratch_bytes >= SCRATCH_BYTES or batch.read_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch(read.file)
        batch.read_bytes += read.nbytes
        for row, copies in _by_extent(read, rows, starts):
            _place(batch, read, row, copies, addresses)
    if batch is not None:
        yield batch


def _by_extent(read: Read, rows: Sequence[Row], starts: list[int]) -> Iterator[tuple[Row, list[Copy]]]:
    """The copies of a read extent by extent; what lies between extents, or is not wanted, is not checked."""
    if len(read.copies) == 1:
        copy = read.copies[0]
        yield rows[bisect_right(starts, read.offset + copy.source_start) - 1], [copy]
        return
    found: dict[int, list[Copy]] = {}
    for copy in read.copies:
        found.setdefault(bisect_right(starts, read.offset + copy.source_start) - 1, []).append(copy)
    for place in sorted(found):
        yield rows[place], found[place]


def _place(batch: Batch, read: Read, row: Row, copies: list[Copy], addresses: Sequence[int]) -> None:
    base, nbytes, _, _ = row
    first = min(copy.source_start for copy in copies) + read.offset
    last = max(copy.source_start + _span(copy) for copy in copies) + read.offset
    low = base + (first - base) // GRANULE_BYTES * GRANULE_BYTES
    high = min(base + nbytes, base - (base - last) // GRANULE_BYTES * GRANULE_BYTES)
    if len(copies) == 1 and copies[0].is_direct:
        copy = copies[0]
        address = addresses[copy.target] + copy.target_start * copy.item_bytes
        if (low, high) == (first, last):
            batch.ranges.append(Range(low, high - low, address, False, row))
            return
        if last - first >= _SPLIT_BYTES:
            _place_run(batch, row, copy, address, (low, first, last, high))
            return
    start = batch.into_scratch(low, high, row)
    for copy in copies:
        batch.moves.append(_moved(copy, start + read.offset + copy.source_start - low))


def _place_run(batch: Batch, row: Row, copy: Copy, address: int, edges: tuple[int, int, int, int]) -> None:
    """One long run: whole granules straight into place, those at its ends through scratch."""
    low, first, last, high = edges
    begin = low if low == first else low + GRANULE_BYTES
    end = high if high == last else row[0] + (last - row[0]) // GRANULE_BYTES * GRANULE_BYTES
    for a, b, here in ((low, begin, first), (end, high, end)):
        if a < b:
            start = batch.into_scratch(a, b, row)
            nbytes = min(b, last) - here
            place = copy.target_start * copy.item_bytes + here - first
            batch.moves.append(Moved(start + here - a, copy.target, 1, (nbytes,), (1,), place, (1,)))
    batch.ranges.append(Range(begin, end - begin, address + begin - first, False, row))


def _span(copy: Copy) -> int:
    """Bytes from the first to the last one that a copy takes."""
    span = 1
    for n, stride in zip(copy.shape, copy.source_strides, strict=True):
        span += (n - 1) * stride
    return span * copy.item_bytes


def _moved(copy: Copy, scratch_start: int) -> Moved:
    item = copy.item_bytes
    return Moved(
        scratch_start,
        copy.target,
        item,
        copy.shape,
        tuple(stride * item for stride in copy.source_strides),
        copy.target_start * item,
        tuple(stride * item for stride in copy.target_strides),
    )
