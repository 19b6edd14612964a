"""A flat range of a row-major tensor as boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The elements ``start <= i < stop`` of a row-major tensor of ``shape`` as disjoint boxes, in order.

    Each box is one contiguous run, so its elements lie one after another in the range.  There are at most ``2 N - 1``
    of them for N dimensions, and none for an empty range.
    """
    size = math.prod(shape)
    if not 0 <= start <= stop <= size:
        raise LayoutError(f"flat range {start}:{stop} outside the {size} elements of shape {tuple(shape)}")
    boxes: list[Box] = []
    if start < stop:
        _cut(tuple(shape), (), start, stop, boxes)
    return tuple(boxes)


def _cut(shape: tuple[int, ...], index: tuple[int, ...], start: int, stop: int, boxes: list[Box]) -> None:
    """Append the boxes of ``start:stop`` of the sub-tensor at ``index``; the range is not empty."""
    d = len(index)
    row = math.prod(shape[d + 1 :])
    if d == len(shape) or (start == 0 and stop == row * shape[d]):
        boxes.append(Box(index + (0,) * (len(shape) - d), (1,) * d + shape[d:]))
        return
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        _cut(shape, (*index, last), start - last * row, stop - last * row, boxes)
        return
    if start < first * row:
        _cut(shape, (*index, first - 1), start - (first - 1) * row, row, boxes)
    if first < last:
        zeros = (0,) * (len(shape) - d - 1)
        boxes.append(Box((*index, first, *zeros), (1,) * d + (last - first, *shape[d + 1 :])))
    if last * row < stop:
        _cut(shape, (*index, last), 0, stop - last * row, boxes)
