"""Optimizer tensors as Megatron-core before 0.14 kept them: a grid of local tensors, each flattened.

A tensor of shape [X, Y, Z], cut into local tensors of [x, y, z], is stored as [X/x, Y/y, Z/z, x*y*z], and the last
dimension is cut once more over the data-parallel ranks.
"""

from __future__ import annotations

import math

from ckptengine.errors import Damaged
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment


def is_flattened(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether ``stored`` is the flattened form of ``shape``: one dimension more, and as many elements."""
    return len(stored) == len(shape) + 1 and _local(stored, shape) is not None


def _local(stored: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    grid = stored[:-1]
    if any(cells == 0 or extent % cells for cells, extent in zip(grid, shape, strict=True)):
        return None
    local = tuple(extent // cells for cells, extent in zip(grid, shape, strict=True))
    return local if math.prod(local) == stored[-1] else None


def unflatten(
    name: str, dtype: str, shape: tuple[int, ...], stored: tuple[int, ...], piece: Fragment
) -> list[Fragment]:
    """The boxes of ``shape`` that a stored piece holds: a flat run of one local tensor's elements."""
    local = _local(stored, shape)
    if local is None or piece.box.shape[:-1] != (1,) * len(shape) or not piece.is_contiguous:
        raise Damaged(f"{name}: a flattened piece {piece.box} does not lie inside of one local tensor")
    corner = tuple(cell * extent for cell, extent in zip(piece.box.offsets[:-1], local, strict=True))
    start = piece.box.offsets[-1]
    found: list[Fragment] = []
    offset = piece.offset
    for box in flat_boxes(local, start, start + piece.box.shape[-1]):
        found.append(Fragment(box.shift(corner), piece.file, offset))
        offset += box.size * itemsize(dtype)
    return found
