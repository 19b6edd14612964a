"""Boxes: hyper-rectangles of a tensor's index space, in elements.

Pure integer geometry.  A 0-d tensor has one box, ``Box((), ())``, of one element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ckptengine.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Box:
    """The elements ``offsets[d] <= index[d] < offsets[d] + shape[d]`` in every dimension ``d``."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.shape):
            raise LayoutError(f"box with {len(self.offsets)} offsets and {len(self.shape)} extents")
        if min(self.offsets, default=0) < 0 or min(self.shape, default=0) < 0:
            raise LayoutError(f"box with a negative offset or extent: {self}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box of a whole tensor of ``shape``."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(offset + extent for offset, extent in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common elements, or None where there are none."""
        offsets: list[int] = []
        shape: list[int] = []
        for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True):
            start = max(a, b)
            extent = min(a + n, b + m) - start
            if extent <= 0:
                return None
            offsets.append(start)
            shape.append(extent)
        return Box(tuple(offsets), tuple(shape))

    def contains(self, other: Box) -> bool:
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        )

    def subtract(self, other: Box) -> list[Box]:
        """Disjoint boxes (at most two per dimension) that cover the elements of self outside ``other``."""
        common = self.intersect(other)
        if common is None:
            return [] if self.size == 0 else [self]
        rest: list[Box] = []
        offsets, shape = list(self.offsets), list(self.shape)
        for d in range(self.ndim):
            below = common.offsets[d] - offsets[d]
            above = offsets[d] + shape[d] - (common.offsets[d] + common.shape[d])
            if below:
                rest.append(Box(tuple(offsets), (*shape[:d], below, *shape[d + 1 :])))
            if above:
                top = common.offsets[d] + common.shape[d]
                rest.append(Box((*offsets[:d], top, *offsets[d + 1 :]), (*shape[:d], above, *shape[d + 1 :])))
            offsets[d], shape[d] = common.offsets[d], common.shape[d]
        return rest

    def shift(self, delta: Sequence[int]) -> Box:
        """The same box moved by ``delta``."""
        return Box(tuple(a + b for a, b in zip(self.offsets, delta, strict=True)), self.shape)

    def relative_to(self, outer: Box) -> Box:
        """The same elements counted from ``outer``'s first one; ``outer`` must contain self."""
        return self.shift(tuple(-offset for offset in outer.offsets))

    def __str__(self) -> str:
        ends = zip(self.offsets, self.ends, strict=True)
        return "[" + ", ".join(f"{start}:{end}" for start, end in ends) + "]"


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous row-major array of ``shape``."""
    return _row_major_strides(tuple(shape))


@lru_cache(maxsize=4096)
def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
