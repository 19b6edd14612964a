"""The proof that boxes cover a tensor exactly: in bounds, disjoint, complete.  n log n in the boxes.

Boxes that are single runs of the row-major tensor (row shards, flat ranges) are proven as intervals of a line.  Others
are separated recursively along whichever dimension parts them into independent groups; where none does, the region is
halved at a box boundary.  What fails yields a witness: two boxes that overlap, or a box that nothing covers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.placement import Flat, Partial
from ckptengine.layout.sharding import Layout

Corners = NDArray[np.int64]

_FEW = 6


def prove_cover(name: str, shape: Sequence[int], boxes: Sequence[Box], *, within: Box | None = None) -> None:
    """Raise `LayoutError` naming the tensor and an overlapping pair or a missing box, unless the cover is exact.

    The boxes must cover the whole tensor, or ``within``, a box of it that none of them may leave.
    """
    shape = tuple(shape)
    if len(boxes) == 1 and boxes[0] == (within or Box.whole(shape)):
        return
    wrong = next((box for box in boxes if box.ndim != len(shape)), None)
    if wrong is not None:
        raise LayoutError(f"tensor {name!r} of shape {shape}: box {wrong} has {wrong.ndim} dimensions")
    count, ndim = len(boxes), len(shape)
    try:
        low = np.array([box.offsets for box in boxes], np.int64).reshape(count, ndim)
        extent = np.array([box.shape for box in boxes], np.int64).reshape(count, ndim)
    except OverflowError:
        raise LayoutError(f"tensor {name!r} of shape {shape}: a box beyond 2**63 elements") from None
    prove_cover_arrays(name, shape, low, extent, within=within)


def prove_cover_arrays(
    name: str, shape: Sequence[int], offsets: Corners, extents: Corners, *, within: Box | None = None
) -> None:
    """`prove_cover` of the boxes in two int64[boxes, dimensions] arrays."""
    shape = tuple(shape)
    whole = within or Box.whole(shape)
    if max(math.prod(shape), *shape, 0) > np.iinfo(np.int64).max:
        raise LayoutError(f"tensor {name!r}: shape {shape} has more than 2**63 elements")
    full = np.array(whole.shape, np.int64)
    given, offsets = offsets, offsets - np.array(whole.offsets, np.int64)
    bad = ((offsets < 0) | (extents < 0) | (offsets > full) | (extents > full - np.minimum(offsets, full))).any(axis=1)
    if bad.any():
        i = int(bad.argmax())
        ends = zip(given[i].tolist(), extents[i].tolist(), strict=True)
        box = ", ".join(f"{start}:{start + n}" for start, n in ends)
        raise LayoutError(f"tensor {name!r} of shape {shape}: box [{box}] is out of bounds {whole}")
    solid = (extents > 0).all(axis=1)
    low, high = offsets[solid], (offsets + extents)[solid]
    if whole.size == 0:
        return
    proof = _Proof(name, shape, whole)
    if not len(low):
        proof.missing(Box.whole(whole.shape))
    if not shape:
        if len(low) > 1:
            proof.overlap(Box((), ()), Box((), ()))
        return
    if not proof.as_line(low, high):
        proof.as_boxes(low, high)


def prove_layout(name: str, shape: Sequence[int], layout: Layout) -> None:
    """`prove_cover` of what the ranks of a sharding hold, replicas counted once; O(1) for a mesh of any size."""
    shape = tuple(shape)
    if isinstance(layout, Irregular):
        groups = {layout.replica_group(rank)[0] for rank in layout.holders()}
        prove_cover(name, shape, [piece.box for rank in sorted(groups) for piece in layout.pieces(rank, shape)])
        return
    if any(isinstance(placement, Partial) for placement in layout.placements):
        raise LayoutError(f"tensor {name!r}: {layout.placements} holds partial values; reduce them before saving")
    layout.pieces(int(layout.mesh.rank_at((0,) * len(layout.mesh.shape))), shape)  # the placements fit the shape
    flats = [axis for axis, placement in enumerate(layout.placements) if isinstance(placement, Flat)]
    if flats:
        flat = layout.placements[flats[0]]
        assert isinstance(flat, Flat)
        largest = layout.largest_shard(shape)
        count = math.prod(layout.mesh.shape[axis] for axis in flats)
        if flat.part_for(largest, count) * count < flat.offset + math.prod(largest):
            raise LayoutError(
                f"tensor {name!r} of shape {shape}: {count} flat parts of {flat.part} elements end before the "
                f"{math.prod(largest)} elements from {flat.offset} on do"
            )


class _Proof:
    """One proof, in coordinates of the region to cover; knows what to call the tensor when it fails."""

    def __init__(self, name: str, shape: tuple[int, ...], region: Box) -> None:
        self.what = f"tensor {name!r} of shape {shape}"
        self.origin = region.offsets
        self.shape = region.shape

    def missing(self, box: Box) -> None:
        raise LayoutError(f"{self.what}: nothing covers {box.shift(self.origin)}")

    def overlap(self, a: Box, b: Box) -> None:
        raise LayoutError(f"{self.what}: boxes {a.shift(self.origin)} and {b.shift(self.origin)} overlap")

    def as_line(self, low: Corners, high: Corners) -> bool:
        """Prove boxes that are all one run each; False, having proven nothing, where some are not."""
        extent = high - low
        full = np.array(self.shape, np.int64)
        # One run: from the first dimension of more than one index on, all later ones are whole.
        begun = np.cumsum(extent > 1, axis=1) - (extent > 1) > 0
        if not ((extent == full) | ~begun).all():
            return False
        start = low @ np.array(row_major_strides(self.shape), np.int64)
        order = np.argsort(start, kind="stable")
        start = start[order]
        end = start + extent.prod(axis=1)[order]
        overlaps = np.flatnonzero(start[1:] < end[:-1])
        if overlaps.size:
            i, j = order[overlaps[0]], order[overlaps[0] + 1]
            self.overlap(_box(low[i], high[i]), _box(low[j], high[j]))
        size = math.prod(self.shape)
        ends, starts = np.concatenate([[0], end]), np.concatenate([start, [size]])
        gaps = np.flatnonzero(ends < starts)
        if gaps.size:
            self.missing(flat_boxes(self.shape, int(ends[gaps[0]]), int(starts[gaps[0]]))[0])
        return True

    def as_boxes(self, low: Corners, high: Corners) -> None:
        whole = np.zeros(len(self.shape), np.int64), np.array(self.shape, np.int64)
        # Every entry: the boxes that lie in a region, cut to it, which they must cover.
        stack = [(low, high, whole)]
        while stack:
            low, high, region = stack.pop()
            if len(low) <= _FEW:
                self._few(low, high, region)
                continue
            groups = _separate(low, high)
            stack += self._halves(low, high, region) if groups is None else self._groups(low, high, region, *groups)

    def _few(self, low: Corners, high: Corners, region: tuple[Corners, Corners]) -> None:
        boxes = [_box(a, b) for a, b in zip(low, high, strict=True)]
        for a, b in itertools.combinations(boxes, 2):
            if a.intersect(b) is not None:
                self.overlap(a, b)
        whole = _box(*region)
        if sum(box.size for box in boxes) == whole.size:
            return
        rest = [whole]
        for box in boxes:
            rest = [part for piece in rest for part in piece.subtract(box)]
        self.missing(rest[0])

    def _groups(
        self, low: Corners, high: Corners, region: tuple[Corners, Corners], dim: int, order: Corners, cuts: Corners
    ) -> list[tuple[Corners, Corners, tuple[Corners, Corners]]]:
        """The regions of groups that lie one behind the other along ``dim``; single boxes are proven here."""
        low, high = low[order], high[order]
        first = np.concatenate([[0], cuts])
        last = np.concatenate([cuts, [len(low)]])
        starts, ends = low[first, dim], np.maximum.reduceat(high[:, dim], first)
        bounds = np.concatenate([[region[0][dim]], ends]), np.concatenate([starts, [region[1][dim]]])
        gaps = np.flatnonzero(bounds[0] < bounds[1])
        if gaps.size:
            gap = _with(region[0], dim, bounds[0][gaps[0]]), _with(region[1], dim, bounds[1][gaps[0]])
            self.missing(_box(*gap))
        single = first[last - first == 1]
        others = np.arange(low.shape[1]) != dim
        short = (low[single][:, others] != region[0][others]) | (high[single][:, others] != region[1][others])
        if short.any():
            i = single[int(short.any(axis=1).argmax())]
            slab = _with(region[0], dim, low[i, dim]), _with(region[1], dim, high[i, dim])
            self.missing(_box(*slab).subtract(_box(low[i], high[i]))[0])
        return [
            (low[a:b], high[a:b], (_with(region[0], dim, start), _with(region[1], dim, end)))
            for a, b, start, end in zip(first, last, starts, ends, strict=True)
            if b - a > 1
        ]

    def _halves(
        self, low: Corners, high: Corners, region: tuple[Corners, Corners]
    ) -> list[tuple[Corners, Corners, tuple[Corners, Corners]]]:
        """The region cut in two at the middle box boundary of the dimension that has most of them."""
        edges = [np.unique(np.concatenate([low[:, d], high[:, d]])) for d in range(low.shape[1])]
        inside = [e[(e > region[0][d]) & (e < region[1][d])] for d, e in enumerate(edges)]
        dim = max(range(len(inside)), key=lambda d: inside[d].size)
        if not inside[dim].size:  # every box is the whole region
            self.overlap(_box(low[0], high[0]), _box(low[1], high[1]))
        cut = inside[dim][inside[dim].size // 2]
        below, above = low[:, dim] < cut, high[:, dim] > cut
        upper, lower = high[below].copy(), low[above].copy()
        upper[:, dim] = np.minimum(upper[:, dim], cut)
        lower[:, dim] = np.maximum(lower[:, dim], cut)
        return [
            (low[below], upper, (region[0], _with(region[1], dim, cut))),
            (lower, high[above], (_with(region[0], dim, cut), region[1])),
        ]


def _separate(low: Corners, high: Corners) -> tuple[int, Corners, Corners] | None:
    """(dimension, order, cuts): the dimension along which boxes part into the fewest, but several, disjoint groups."""
    best: tuple[int, Corners, Corners] | None = None
    for dim in range(low.shape[1]):
        order = np.argsort(low[:, dim], kind="stable")
        reach = np.maximum.accumulate(high[order, dim])
        cuts = np.flatnonzero(low[order[1:], dim] >= reach[:-1]) + 1
        if cuts.size and (best is None or cuts.size < best[2].size):
            best = dim, order, cuts
    return best


def _with(corner: Corners, dim: int, value: np.int64) -> Corners:
    changed = corner.copy()
    changed[dim] = value
    return changed


def _box(low: Corners, high: Corners) -> Box:
    return Box(tuple(low.tolist()), tuple((high - low).tolist()))
