"""Shardings that no mesh describes: every rank's pieces, listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.piece import Piece


@dataclass(frozen=True, slots=True)
class Irregular:
    """Any pieces on any ranks: ``held[i]`` is (rank, its pieces in the order of its local tensor), ranks ascending.

    Ranks whose boxes are the same are replicas; whatever else overlaps is an error of cover.  O(pieces) to store.
    """

    held: tuple[tuple[int, tuple[Piece, ...]], ...]
    _groups: dict[tuple[Box, ...], tuple[int, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _places: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        ranks = [rank for rank, _ in self.held]
        if ranks != sorted(set(ranks)) or (ranks and ranks[0] < 0):
            raise LayoutError(f"irregular sharding: ranks must be distinct, ascending and from 0 on, not {ranks[:20]}")
        self._places.update((rank, i) for i, rank in enumerate(ranks))
        for rank, pieces in self.held:
            boxes = tuple(piece.box for piece in pieces)
            self._groups[boxes] = (*self._groups.get(boxes, ()), rank)

    @classmethod
    def joined(cls, held: Iterable[tuple[int, tuple[Piece, ...]]]) -> Irregular:
        """What several ranks list, as one sharding.

        A box that ranks share which otherwise hold different ones (key heads beside query heads) stays with the first
        of them, so that it is stored once.
        """
        owners: dict[Box, tuple[Box, ...]] = {}
        kept: list[tuple[int, tuple[Piece, ...]]] = []
        for rank, pieces in sorted(held, key=lambda one: one[0]):
            boxes = tuple(piece.box for piece in pieces)
            kept.append((rank, tuple(piece for piece in pieces if owners.setdefault(piece.box, boxes) == boxes)))
        return cls(tuple(kept))

    def pieces(self, rank: int, shape: Sequence[int]) -> tuple[Piece, ...]:
        """What ``rank`` holds; `LayoutError` where a box sticks out of ``shape``."""
        place = self._places.get(rank)
        if place is None:
            return ()
        whole = Box.whole(shape)
        for piece in self.held[place][1]:
            if piece.box.ndim != whole.ndim or not whole.contains(piece.box):
                raise LayoutError(f"rank {rank} holds box {piece.box} outside a tensor of shape {tuple(shape)}")
        return self.held[place][1]

    def local_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """One dimension: elements up to the last one that a piece of ``rank`` names."""
        ends = [
            piece.start + 1 + sum((n - 1) * s for n, s in zip(piece.box.shape, piece.strides, strict=True))
            for piece in self.pieces(rank, shape)
            if piece.size
        ]
        return (max(ends, default=0),)

    def holders(self) -> list[int]:
        """The listed ranks, ascending."""
        return [rank for rank, _ in self.held]

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that list the same boxes as ``rank``, itself included; () for a rank that is not listed."""
        place = self._places.get(rank)
        if place is None:
            return ()
        return self._groups[tuple(piece.box for piece in self.held[place][1])]

    def replica_count(self, rank: int) -> int:
        """How many ranks list the same boxes as ``rank``."""
        return len(self.replica_group(rank))

    def replica_index(self, rank: int) -> int | None:
        """The place of ``rank`` in its `replica_group`; None for a rank that is not listed."""
        group = self.replica_group(rank)
        return group.index(rank) if group else None

    def overlapping(self, box: Box, shape: Sequence[int], *, replica: int = 0) -> Iterator[tuple[int, int, Piece]]:
        """(rank, ordinal, piece) of all pieces that share an element with ``box``, one member per replica group."""
        for group in self._groups.values():
            rank = group[replica % len(group)]
            for ordinal, piece in enumerate(self.pieces(rank, shape)):
                if piece.box.intersect(box) is not None:
                    yield rank, ordinal, piece
