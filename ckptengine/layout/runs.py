"""A box of a row-major tensor as contiguous runs: one base run repeated by nested strided loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides


@dataclass(frozen=True, slots=True)
class Runs:
    """``length`` elements from element ``first``, repeated by ``loops`` of (count, stride), outermost first.

    All numbers are elements of the tensor's row-major order.  Runs come in ascending order, are disjoint and as long
    as they can be; no loop has a count of 1.  An empty box has ``length`` 0 and no loops.
    """

    first: int
    length: int
    loops: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of runs."""
        return math.prod(count for count, _ in self.loops) if self.length else 0

    @property
    def size(self) -> int:
        """Number of elements of all runs."""
        return self.count * self.length

    @property
    def stop(self) -> int:
        """One past the last element of the last run."""
        return self.first + sum((count - 1) * stride for count, stride in self.loops) + self.length

    def starts(self) -> NDArray[np.int64]:
        """int64[count]: the first element of every run, ascending."""
        if not self.length:
            return np.zeros(0, np.int64)
        starts = np.array([self.first], np.int64)
        for count, stride in self.loops:
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        return starts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(first element, length) of every run, ascending."""
        for start in self.starts().tolist():
            yield start, self.length


def runs_of(box: Box, shape: Sequence[int]) -> Runs:
    """The contiguous runs of ``box`` in a row-major tensor of ``shape``; `LayoutError` where it sticks out."""
    if len(shape) != box.ndim or any(end > n for end, n in zip(box.ends, shape, strict=True)):
        raise LayoutError(f"box {box} does not lie inside a tensor of shape {tuple(shape)}")
    if box.size == 0:
        return Runs(0, 0, ())
    strides = row_major_strides(shape)
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    length = 1
    loops: list[tuple[int, int]] = []  # innermost first while building
    for extent, stride in zip(reversed(box.shape), reversed(strides), strict=True):
        if extent == 1:
            continue
        if not loops and stride == length:
            length *= extent
        elif loops and loops[-1][0] * loops[-1][1] == stride:
            loops[-1] = (loops[-1][0] * extent, loops[-1][1])
        else:
            loops.append((extent, stride))
    return Runs(first, length, tuple(reversed(loops)))
