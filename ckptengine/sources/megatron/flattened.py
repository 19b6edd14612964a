"""Optimizer tensors as Megatron-core before 0.14 kept them: a grid of local tensors, each flattened.

A tensor of shape [X, Y, Z], cut into local tensors of [x, y, z], is stored as [X/x, Y/y, Z/z, x*y*z], and the last
dimension is cut once more over the data-parallel ranks.  Experts that are fused for one matrix product lie in memory
with their last two dimensions the other way round (*turned*), and so do their states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from ckptengine.errors import Damaged
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment


def is_flattened(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether ``stored`` is the flattened form of ``shape``: one dimension more, and as many elements."""
    return len(stored) == len(shape) + 1 and _local(stored, shape) is not None


def turned(values: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of dimensions with the last two the other way round."""
    return (*values[:-2], values[-1], values[-2]) if len(values) > 1 else values


def _local(stored: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    grid = stored[:-1]
    if any(cells == 0 or extent % cells for cells, extent in zip(grid, shape, strict=True)):
        return None
    local = tuple(extent // cells for cells, extent in zip(grid, shape, strict=True))
    return local if math.prod(local) == stored[-1] else None


def unflatten(
    name: str, dtype: str, shape: tuple[int, ...], stored: tuple[int, ...], piece: Fragment, is_turned: bool = False
) -> list[Fragment]:
    """The boxes of ``shape`` that a stored piece holds: a flat run of one local tensor's elements."""
    local = _local(stored, turned(shape) if is_turned else shape)
    if local is None or piece.box.shape[:-1] != (1,) * len(shape) or not piece.is_contiguous:
        raise Damaged(f"{name}: a flattened piece {piece.box} does not lie inside of one local tensor")
    corner = tuple(cell * extent for cell, extent in zip(piece.box.offsets[:-1], local, strict=True))
    start = piece.box.offsets[-1]
    found: list[Fragment] = []
    offset = piece.offset
    for run in flat_boxes(local, start, start + piece.box.shape[-1]):
        box, strides = run.shift(corner), None
        if is_turned:
            box, strides = Box(turned(box.offsets), turned(box.shape)), turned(row_major_strides(run.shape))
        found.append(Fragment(box, piece.file, offset, strides))
        offset += run.size * itemsize(dtype)
    return found


def elements(fragment: Fragment, count: int, width: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(place in the tensor, byte offset in the file) of up to ``count`` elements of a fragment, spread over it."""
    box = fragment.box
    strides = fragment.strides if fragment.strides is not None else row_major_strides(box.shape)
    steps = [range(0, extent, max(1, -(-extent // 4))) for extent in box.shape]
    for at in itertools.islice(itertools.product(*steps), count):
        place = tuple(o + i for o, i in zip(box.offsets, at, strict=True))
        yield place, fragment.offset + sum(i * s for i, s in zip(at, strides, strict=True)) * width
