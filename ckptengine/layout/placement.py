"""How one mesh axis cuts a tensor, and what that does to the index spans of a tensor dimension.

A rank's part of one tensor dimension is a list of *spans* ``(start, stop)`` in local order: one for plain shards,
several for strided ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError

MAX_SPLIT_FACTOR = 1 << 16
"""Expanding a strided shard costs time in its split factor, which is the number of ranks of another axis."""

Span = tuple[int, int]
Spans = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of the axis holds the same elements."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank of the axis holds its own values of the same elements; the tensor is their mean."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Dimension ``dim`` in chunks of ``ceil(n / ranks)``, in the order of the axis; late ranks may get none."""

    dim: int

    def __post_init__(self) -> None:
        _check_dim(self.dim)


@dataclass(frozen=True, slots=True)
class StridedShard:
    """Dimension ``dim`` in ``split_factor`` chunks, each of them in chunks over the axis; a rank holds one of each.

    This is how a cut that was made *before* the one of an axis to the right is written (torch's ``_StridedShard``:
    FSDP over tensor parallel).
    """

    dim: int
    split_factor: int

    def __post_init__(self) -> None:
        _check_dim(self.dim)
        if not 1 <= self.split_factor <= MAX_SPLIT_FACTOR:
            raise LayoutError(f"a strided shard needs a split factor from 1 to {MAX_SPLIT_FACTOR}: {self}")


@dataclass(frozen=True, slots=True)
class Flat:
    """The row-major elements of what the other axes leave, cut evenly as one flat range (ZeRO).

    The range lies in a flat buffer from element ``offset`` on; rank ``i`` of the axis has the buffer's elements from
    ``i * part`` on.  ``part`` None is ``ceil(n / ranks)``.  The local tensor is one-dimensional: the rank's own
    elements only, or with ``padded`` its whole part of the buffer.  With ``aligned`` the cuts move to boundaries of
    trailing blocks of the tensor (rows) as long as that unbalances the parts by at most an eighth.
    """

    offset: int = 0
    part: int | None = None
    padded: bool = False
    aligned: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.padded and self.in_place:
            raise LayoutError(f"a flat cut is either padded or in place: {self}")
        if self.offset < 0 or (self.part is not None and self.part < 1):
            raise LayoutError(f"a flat cut needs an offset from 0 and a part from 1 on: {self}")
        if self.aligned and (self.offset or self.part is not None):
            raise LayoutError(f"an aligned flat cut has neither an offset nor a part of its own: {self}")

    def part_for(self, shape: Sequence[int], count: int) -> int:
        """Elements per rank of the flat buffer where a local tensor of ``shape`` is cut over ``count`` ranks."""
        if self.part is not None:
            return self.part
        size = 1
        for n in shape:
            size *= n
        part = max(1, -(-(self.offset + size) // count))
        if not size or not self.aligned:
            return part
        block = 1
        for n in reversed(shape):
            if block * n > part // 8:
                break
            block *= n
        return -(-part // block) * block


Placement = Replicate | Partial | Shard | StridedShard | Flat


def _check_dim(dim: int) -> None:
    if not 0 <= dim < 64:
        raise LayoutError(f"cannot shard dimension {dim}; dimensions count from 0, negative ones must be resolved")


def split(spans: Spans, cut: Shard | StridedShard, count: int, index: int) -> Spans:
    """What rank ``index`` of an axis of ``count`` ranks gets of ``spans``."""
    return tuple(_take(spans, _chunks(length_of(spans), cut, count, index)))


def touching(spans: Spans, cut: Shard | StridedShard, count: int, wanted: Span) -> list[int]:
    """The ranks of an axis whose part of ``spans`` meets ``wanted``, ascending."""
    total = length_of(spans)
    factor = cut.split_factor if isinstance(cut, StridedShard) else 1
    outer = max(1, -(-total // factor))
    found: set[int] = set()
    for low, high in positions_of(spans, wanted):
        while low < high:
            base = low // outer * outer
            end = min(base + outer, total)
            inner = -(-(end - base) // count)
            stop = min(high, end)
            found.update(range((low - base) // inner, (stop - 1 - base) // inner + 1))
            low = stop
    return sorted(found)


def _chunks(total: int, cut: Shard | StridedShard, count: int, index: int) -> Iterator[Span]:
    """The positions, among ``total``, that go to rank ``index``."""
    factor = cut.split_factor if isinstance(cut, StridedShard) else 1
    outer = max(1, -(-total // factor))
    for base in range(0, total, outer):
        end = min(base + outer, total)
        inner = -(-(end - base) // count)
        low = min(end, base + index * inner)
        high = min(end, low + inner)
        if low < high:
            yield low, high


def sizes_along(n: int, dim: int, placements: Sequence[Placement], mesh_shape: Sequence[int]) -> NDArray[np.int64]:
    """The indices of dimension ``dim``, of ``n`` indices, that each rank gets; broadcastable to ``mesh_shape``."""
    sizes = np.full((1,) * len(mesh_shape), n, np.int64)
    for axis, (cut, count) in enumerate(zip(placements, mesh_shape, strict=True)):
        if not isinstance(cut, (Shard, StridedShard)) or cut.dim != dim:
            continue
        index = np.arange(count).reshape([-1 if a == axis else 1 for a in range(len(mesh_shape))])
        factor = cut.split_factor if isinstance(cut, StridedShard) else 1
        outer = -(-sizes // factor)
        parts = np.zeros(1, np.int64)
        for j in range(min(factor, n)):
            chunk = np.clip(sizes - outer * j, 0, outer)
            inner = -(-chunk // count)
            parts = parts + np.clip(chunk - inner * index, 0, inner)
        sizes = parts
    return sizes


def length_of(spans: Spans) -> int:
    """Number of indices in all spans."""
    return sum(stop - start for start, stop in spans)


def _take(spans: Spans, ranges: Iterable[Span]) -> Iterator[Span]:
    """The spans at positions ``ranges`` of the concatenation of ``spans``, with neighbours merged."""
    held: Span | None = None
    for low, high in ranges:
        base = 0
        for start, stop in spans:
            a, b = max(low - base, 0) + start, min(high - base, stop - start) + start
            base += stop - start
            if a >= b:
                continue
            if held is not None and held[1] == a:
                held = held[0], b
                continue
            if held is not None:
                yield held
            held = a, b
    if held is not None:
        yield held


def positions_of(spans: Spans, wanted: Span) -> Iterator[Span]:
    """Where the elements of ``wanted`` lie in the concatenation of ``spans``."""
    base = 0
    for start, stop in spans:
        a, b = max(start, wanted[0]), min(stop, wanted[1])
        if a < b:
            yield base + a - start, base + b - start
        base += stop - start
