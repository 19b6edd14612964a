"""Pieces: boxes of a logical tensor and where a rank's local tensor holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ckptengine.layout.box import Box, row_major_strides


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the logical tensor and the strided region of the rank's local tensor that holds it.

    The element at local index ``i`` of ``box`` is element ``start + sum(i[d] * strides[d])`` of the local tensor
    viewed as contiguous row-major.  One local tensor often has several pieces.
    """

    box: Box
    start: int
    strides: tuple[int, ...]

    @classmethod
    def packed(cls, box: Box, start: int = 0) -> Piece:
        """The piece of a box whose elements lie in row-major order from ``start``."""
        return cls(box, start, row_major_strides(box.shape))

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.box.size

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after another in row-major order in the local tensor."""
        plain = row_major_strides(self.box.shape)
        return self.strides == plain or all(
            n <= 1 or a == b for n, a, b in zip(self.box.shape, self.strides, plain, strict=True)
        )

    def part(self, wanted: Box) -> Piece:
        """The piece of ``wanted``, a box inside this piece's own."""
        inner = zip(wanted.offsets, self.box.offsets, self.strides, strict=True)
        return Piece(wanted, self.start + sum((a - b) * stride for a, b, stride in inner), self.strides)


@lru_cache(maxsize=4096)
def whole(shape: tuple[int, ...]) -> tuple[Piece, ...]:
    """The one piece of a tensor that is held entirely; none of an empty one."""
    return (Piece.packed(Box.whole(shape)),) if 0 not in shape else ()


def packed_pieces(boxes: Sequence[Box]) -> tuple[Piece, ...]:
    """Boxes that lie one after another in a local tensor, each in row-major order."""
    pieces: list[Piece] = []
    start = 0
    for box in boxes:
        pieces.append(Piece.packed(box, start))
        start += box.size
    return tuple(pieces)
