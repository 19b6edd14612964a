"""Shardings: how a logical tensor is cut over the ranks, O(1) to store for any number of them.

`Sharding` is a mesh and one placement per axis, in torch's order: axes act from left to right, so with two plain
shards of one dimension the left axis is the outer one.  `Irregular` lists what every rank holds.  Both answer the same
questions: what does a rank hold, who else holds it, and who holds anything of a box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.mesh import Arithmetic, Mesh, unravel
from ckptengine.layout.piece import Piece
from ckptengine.layout.placement import (
    Flat,
    Partial,
    Placement,
    Replicate,
    Shard,
    Spans,
    StridedShard,
    length_of,
    positions_of,
    sizes_along,
    split,
    touching,
)

__all__ = [
    "Arithmetic",
    "Flat",
    "Irregular",
    "Layout",
    "Mesh",
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "Sharding",
    "StridedShard",
    "replicated",
]


@dataclass(frozen=True, slots=True)
class Sharding:
    """One placement per mesh axis.  Several `Flat` axes must be equal; they act together, the left one outer."""

    mesh: Mesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if len(self.placements) != len(self.mesh.shape):
            raise LayoutError(f"{len(self.placements)} placements for a mesh of {len(self.mesh.shape)} axes")
        if len({p for p in self.placements if isinstance(p, Flat)}) > 1:
            raise LayoutError(f"flat cuts over several axes must be equal: {self.placements}")

    def pieces(self, rank: int, shape: Sequence[int]) -> tuple[Piece, ...]:
        """What ``rank`` holds of a tensor of ``shape``, in the order of its local tensor; () for nothing."""
        self._check(shape)
        coordinate = self.mesh.coordinate_of(rank)
        if coordinate is None:
            return ()
        return self._pieces(self._spans(coordinate, shape), coordinate)

    def local_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the local tensor of ``rank``; one-dimensional under a flat cut; (0,) outside the mesh."""
        self._check(shape)
        coordinate = self.mesh.coordinate_of(rank)
        if coordinate is None:
            return (0,)
        local = tuple(length_of(spans) for spans in self._spans(coordinate, shape))
        flat = self._flat()
        if flat is None:
            return local
        part, low, high = self._flat_range(flat, local, coordinate)
        return local if flat.in_place else (part if flat.padded else high - low,)

    def local_sizes(self, shape: Sequence[int]) -> NDArray[np.int64]:
        """int64[mesh shape]: the elements that the rank at every coordinate holds.

        Padding does not count; an aligned flat cut counts as an even one.
        """
        self._check(shape)
        sizes = np.ones((1,) * len(self.mesh.shape), np.int64)
        for dim, n in enumerate(shape):
            sizes = sizes * sizes_along(n, dim, self.placements, self.mesh.shape)
        flat = self._flat()
        if flat is not None:
            count, index = 1, np.zeros((1,) * len(self.mesh.shape), np.int64)
            for axis in self._axes(Flat):
                n = self.mesh.shape[axis]
                along = np.arange(n).reshape([-1 if a == axis else 1 for a in range(len(self.mesh.shape))])
                count, index = count * n, index * n + along
            part = np.maximum(-(-(flat.offset + sizes) // count), 1) if flat.part is None else np.int64(flat.part)
            start = index * part - flat.offset
            sizes = np.clip(start + part, 0, sizes) - np.clip(start, 0, sizes)
        return np.broadcast_to(sizes, self.mesh.shape)

    def largest_shard(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The largest shape that any rank's shard has before flat cuts."""
        self._check(shape)
        return tuple(length_of(spans) for spans in self._spans((0,) * len(self.mesh.shape), shape))

    def holders(self) -> list[int]:
        """Every rank of the mesh, ascending; some may hold nothing of a small tensor."""
        return sorted(self.mesh.all_ranks().tolist())

    def replica_count(self, rank: int | None = None) -> int:
        """How many ranks hold the same elements; the same for every rank of the mesh."""
        return math.prod(self.mesh.shape[axis] for axis in self._replica_axes())

    def replica_index(self, rank: int) -> int | None:
        """The place of ``rank`` in its `replica_group`; None outside the mesh."""
        coordinate = self.mesh.coordinate_of(rank)
        return None if coordinate is None else self._ravel(coordinate, self._replica_axes())

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same elements as ``rank``, itself included; () outside the mesh."""
        coordinate = self.mesh.coordinate_of(rank)
        if coordinate is None:
            return ()
        return tuple(self.mesh.rank_at(self._with_replica(coordinate, k)) for k in range(self.replica_count()))

    def overlapping(self, box: Box, shape: Sequence[int], *, replica: int = 0) -> Iterator[tuple[int, int, Piece]]:
        """(rank, ordinal, piece) of all pieces that share an element with ``box``.

        Of every replica group only member ``replica % size`` is listed; ``ordinal`` counts in ``pieces(rank)``.  The
        cost is that of what is found, whatever the size of the mesh.
        """
        self._check(shape)
        if len(shape) != box.ndim or not Box.whole(shape).contains(box):
            raise LayoutError(f"box {box} asked of a tensor of shape {tuple(shape)}")
        if box.size == 0:
            return
        by_dim = [list(self._meeting(dim, n, box)) for dim, n in enumerate(shape)]
        for choice in itertools.product(*by_dim):
            spans = [found for found, _ in choice]
            fixed = {axis: c for _, chosen in choice for axis, c in chosen}
            for coordinate in self._completed(fixed, spans, box, replica):
                rank = self.mesh.rank_at(coordinate)
                for ordinal, piece in enumerate(self._pieces(spans, coordinate)):
                    if piece.box.intersect(box) is not None:
                        yield rank, ordinal, piece

    def splitting_replicas(self) -> Sharding:
        """The same sharding, but each member of a replica group answers for an aligned flat part of what it holds."""
        if self._flat() is not None:
            raise LayoutError("a flat sharding cannot be cut flat once more")
        flat = Flat(aligned=True, in_place=True)
        return Sharding(self.mesh, tuple(flat if isinstance(p, Replicate) else p for p in self.placements))

    def _check(self, shape: Sequence[int]) -> None:
        for placement in self.placements:
            if isinstance(placement, (Shard, StridedShard)) and placement.dim >= len(shape):
                raise LayoutError(f"{placement} does not fit a tensor of shape {tuple(shape)}")

    def _flat(self) -> Flat | None:
        return next((p for p in self.placements if isinstance(p, Flat)), None)

    def _axes(self, kind: type[Placement]) -> list[int]:
        return [axis for axis, placement in enumerate(self.placements) if isinstance(placement, kind)]

    def _replica_axes(self) -> list[int]:
        return self._axes(Replicate)

    def _ravel(self, coordinate: Sequence[int], axes: Sequence[int]) -> int:
        index = 0
        for axis in axes:
            index = index * self.mesh.shape[axis] + coordinate[axis]
        return index

    def _with_replica(self, coordinate: Sequence[int], replica: int) -> tuple[int, ...]:
        axes = self._replica_axes()
        moved = list(coordinate)
        for axis, c in zip(axes, unravel(replica, [self.mesh.shape[axis] for axis in axes]), strict=True):
            moved[axis] = c
        return tuple(moved)

    def _spans(self, coordinate: Sequence[int], shape: Sequence[int]) -> list[Spans]:
        """The spans of every dimension at a coordinate, flat cuts aside."""
        spans: list[Spans] = [((0, n),) if n else () for n in shape]
        for placement, count, index in zip(self.placements, self.mesh.shape, coordinate, strict=True):
            if isinstance(placement, (Shard, StridedShard)):
                spans[placement.dim] = split(spans[placement.dim], placement, count, index)
        return spans

    def _flat_range(self, flat: Flat, local: Sequence[int], coordinate: Sequence[int]) -> tuple[int, int, int]:
        """(elements per part, start, stop) of the rank's range of the row-major elements of ``local``."""
        axes = self._axes(Flat)
        part = flat.part_for(local, math.prod(self.mesh.shape[axis] for axis in axes))
        start = self._ravel(coordinate, axes) * part - flat.offset
        size = math.prod(local)
        low = min(max(start, 0), size)
        return part, low, min(max(start + part, low), size)

    def _pieces(self, spans: Sequence[Spans], coordinate: Sequence[int]) -> tuple[Piece, ...]:
        local = tuple(length_of(found) for found in spans)
        flat = self._flat()
        if flat is None:
            return tuple(_cut_at_spans(Box.whole(local), spans, local, 0))
        part, low, high = self._flat_range(flat, local, coordinate)
        begin = 0 if flat.in_place else low
        if flat.padded:  # positions count from the first element of the rank's part of the buffer
            begin = self._ravel(coordinate, self._axes(Flat)) * part - flat.offset
        boxes = flat_boxes(local, low, high)
        return tuple(piece for box in boxes for piece in _cut_at_spans(box, spans, local, begin))

    def _meeting(self, dim: int, n: int, box: Box) -> Iterator[tuple[Spans, tuple[tuple[int, int], ...]]]:
        """(spans, ((axis, index), ...)) of every choice on the axes that cut ``dim`` that meets ``box``."""
        wanted = box.offsets[dim], box.offsets[dim] + box.shape[dim]
        found: list[tuple[Spans, tuple[tuple[int, int], ...]]] = [(((0, n),), ())]
        for axis, (placement, count) in enumerate(zip(self.placements, self.mesh.shape, strict=True)):
            if isinstance(placement, (Shard, StridedShard)) and placement.dim == dim:
                found = [
                    (split(spans, placement, count, index), (*chosen, (axis, index)))
                    for spans, chosen in found
                    for index in touching(spans, placement, count, wanted)
                ]
        return iter(found)

    def _completed(
        self, fixed: dict[int, int], spans: Sequence[Spans], box: Box, replica: int
    ) -> Iterator[tuple[int, ...]]:
        """The coordinates with ``fixed`` indices on the sharded axes that can meet ``box``, one per replica group."""
        everywhere = [fixed.get(axis, 0) for axis in range(len(self.mesh.shape))]
        base = self._with_replica(everywhere, replica % self.replica_count())
        flat_axes, partial_axes = self._axes(Flat), self._axes(Partial)
        flat_indices: Sequence[int] = (0,)
        flat = self._flat()
        if flat is not None:
            local = tuple(length_of(found) for found in spans)
            sizes = [self.mesh.shape[axis] for axis in flat_axes]
            first, last = _flat_bounds(box, spans, local)
            count = math.prod(sizes)
            part = flat.part_for(local, count)
            flat_indices = range((first + flat.offset) // part, min((last + flat.offset) // part + 1, count))
        for partial in itertools.product(*[range(self.mesh.shape[axis]) for axis in partial_axes]):
            for index in flat_indices:
                coordinate = list(base)
                for axis, c in zip(partial_axes, partial, strict=True):
                    coordinate[axis] = c
                if flat is not None:
                    for axis, c in zip(flat_axes, unravel(index, sizes), strict=True):
                        coordinate[axis] = c
                yield tuple(coordinate)


Layout = Sharding | Irregular


def replicated(ranks: Sequence[int]) -> Sharding:
    """The sharding of a plain tensor that each of ``ranks`` holds whole."""
    return Sharding(Mesh((len(ranks),), ("replica",), tuple(ranks)), (Replicate(),))


def _cut_at_spans(box: Box, spans: Sequence[Spans], local: tuple[int, ...], begin: int) -> Iterator[Piece]:
    """A box of the local tensor as pieces of the logical one; positions count from local element ``begin``."""
    if box.size == 0:
        return
    strides = row_major_strides(local)
    choices: list[list[tuple[int, int, int]]] = []  # per dimension: (global start, extent, local start)
    for found, low, n in zip(spans, box.offsets, box.shape, strict=True):
        parts: list[tuple[int, int, int]] = []
        base = 0
        for start, stop in found:
            a, b = max(low, base), min(low + n, base + stop - start)
            if a < b:
                parts.append((start + a - base, b - a, a))
            base += stop - start
        choices.append(parts)
    for corner in itertools.product(*choices):
        start = sum(a * stride for (_, _, a), stride in zip(corner, strides, strict=True)) - begin
        yield Piece(Box(tuple(g for g, _, _ in corner), tuple(n for _, n, _ in corner)), start, strides)


def _flat_bounds(box: Box, spans: Sequence[Spans], local: tuple[int, ...]) -> tuple[int, int]:
    """The first and last row-major position in the local tensor of an element of ``box``; there must be one."""
    first = last = 0
    for found, stride, low, n in zip(spans, row_major_strides(local), box.offsets, box.shape, strict=True):
        ranges = list(positions_of(found, (low, low + n)))
        first += ranges[0][0] * stride
        last += (ranges[-1][1] - 1) * stride
    return first, last
