"""`Sharded` and `PerRank`: what a user says about values that no DTensor describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.piece import Piece, packed_pieces
from ckptengine.layout.sharding import Layout


@dataclass(frozen=True, slots=True)
class PerRank:
    """Marks ``value`` as belonging to this rank alone: it is saved for each rank and given back to the same rank.

    Whatever the state may hold can be wrapped: plain values, tensors, objects with ``state_dict``.
    """

    value: Any


class Sharded:
    """A plain local tensor and where it sits in a logical tensor of ``global_shape``.

    Exactly one way to say where:

    - ``offset``: the local tensor is one box; ``offset[d]`` is its first index in dimension ``d``.
    - ``flat=(start, stop)``: the local tensor, row-major, is the elements ``start <= i < stop`` of the row-major
      logical tensor (of its box ``within=(offsets, shape)`` where given), as in flat optimizer shards.
    - ``parts=[(offsets, shape), ...]``: the local tensor holds several boxes.  With ``dim`` they are concatenated
      along that dimension of the local tensor (fused weights: the local rows of Q, then K, then V); without, they lie
      one after another in its row-major elements.
    - ``layout``: a `Sharding` or `Irregular`, for those who have one; the pieces are those of this ``rank``.

    Trailing elements of a flat local tensor beyond the described ones are padding only if ``padding=True``.

    The tensor may be empty; then nothing of the logical tensor is held here.  Raises `LayoutError` when the sizes do
    not agree or a box sticks out.
    """

    __slots__ = ("global_shape", "layout", "pieces", "tensor")

    def __init__(
        self,
        tensor: torch.Tensor,
        global_shape: Sequence[int],
        *,
        offset: Sequence[int] | None = None,
        flat: tuple[int, int] | None = None,
        within: tuple[Sequence[int], Sequence[int]] | None = None,
        parts: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
        dim: int | None = None,
        layout: Layout | None = None,
        rank: int | None = None,
        padding: bool = False,
    ) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise LayoutError(f"Sharded needs a tensor, not a {type(tensor).__name__}")
        if sum(way is not None for way in (offset, flat, parts, layout)) != 1:
            raise LayoutError("Sharded: say in exactly one way where the tensor sits: offset, flat, parts or layout")
        if (within is not None and flat is None) or (dim is not None and parts is None):
            raise LayoutError("Sharded: within= goes with flat=, and dim= with parts=")
        self.tensor = tensor
        self.global_shape = _ints("global_shape", global_shape)
        self.layout = layout
        local = tuple(tensor.shape)
        if offset is not None:
            self.pieces = self._box(_ints("offset", offset), local)
        elif flat is not None:
            self.pieces = self._flat(flat, within, local)
        elif parts is not None:
            boxes = [Box(_ints("parts", offsets), _ints("parts", shape)) for offsets, shape in parts]
            self.pieces = packed_pieces(boxes) if dim is None else _concatenated(boxes, dim, local)
        elif layout is not None:
            if rank is None:
                raise LayoutError("Sharded: layout= needs rank=, whose part this tensor is")
            self.pieces = layout.pieces(rank, self.global_shape)
        self._check(local, padding)

    def _box(self, offset: tuple[int, ...], local: tuple[int, ...]) -> tuple[Piece, ...]:
        if len(offset) != len(local):
            raise LayoutError(f"Sharded: offset {offset} has not one entry per dimension of a tensor of shape {local}")
        return (Piece.packed(Box(offset, local)),) if math.prod(local) else ()

    def _flat(
        self, flat: tuple[int, int], within: tuple[Sequence[int], Sequence[int]] | None, local: tuple[int, ...]
    ) -> tuple[Piece, ...]:
        outer = Box.whole(self.global_shape)
        if within is not None:
            outer = Box(_ints("within", within[0]), _ints("within", within[1]))
        start, stop = _ints("flat", flat)
        if not 0 <= start <= stop <= outer.size:
            raise LayoutError(f"Sharded: flat range {start}:{stop} is not inside the {outer.size} elements of {outer}")
        boxes = [box.shift(outer.offsets) for box in flat_boxes(outer.shape, start, stop)]
        return packed_pieces(boxes)

    def _check(self, local: tuple[int, ...], padding: bool) -> None:
        whole, held = Box.whole(self.global_shape), 0
        for index, piece in enumerate(self.pieces):
            if piece.box.ndim != whole.ndim or not whole.contains(piece.box):
                raise LayoutError(f"Sharded: box {piece.box} sticks out of the global shape {self.global_shape}")
            for other in self.pieces[:index] if len(self.pieces) <= 64 else ():
                if other.box.intersect(piece.box) is not None:
                    raise LayoutError(f"Sharded: boxes {other.box} and {piece.box} of one tensor overlap")
            held += piece.size
        size = math.prod(local)
        if held > size or (held < size and not padding):
            raise LayoutError(
                f"Sharded: the local tensor of shape {local} has {size} elements, what it is said to hold has {held}"
                + ("" if held > size else "; pass padding=True if the rest is padding")
            )

    def __repr__(self) -> str:
        boxes = ", ".join(str(piece.box) for piece in self.pieces[:4])
        more = f", ... ({len(self.pieces)})" if len(self.pieces) > 4 else ""
        return f"Sharded(shape={tuple(self.tensor.shape)}, global_shape={self.global_shape}, boxes={boxes}{more})"


def _ints(what: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        raise LayoutError(f"Sharded: {what} must be integers, not {values!r}") from None
    if any(value < 0 for value in found):
        raise LayoutError(f"Sharded: {what} must not be negative: {found}")
    return found


def _concatenated(boxes: list[Box], dim: int, local: tuple[int, ...]) -> tuple[Piece, ...]:
    """Boxes laid side by side along ``dim`` of a local tensor of shape ``local``."""
    if not 0 <= dim < len(local):
        raise LayoutError(f"Sharded: dim={dim} is no dimension of a tensor of shape {local}")
    strides = row_major_strides(local)
    pieces: list[Piece] = []
    row = 0
    for box in boxes:
        if (*box.shape[:dim], *box.shape[dim + 1 :]) != (*local[:dim], *local[dim + 1 :]):
            raise LayoutError(f"Sharded: part {box} does not fit beside the others along dim {dim} of {local}")
        if box.size:
            pieces.append(Piece(box, row * strides[dim], strides))
        row += box.shape[dim]
    if row != local[dim]:
        raise LayoutError(f"Sharded: the parts are {row} long along dim {dim}, the tensor of shape {local} is not")
    return tuple(pieces)
