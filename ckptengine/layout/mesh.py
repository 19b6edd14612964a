"""A named grid of ranks.

Nearly every mesh numbers its ranks arithmetically (``start + sum(coordinate[i] * strides[i])``), sub-meshes and other
rank orders included, so that it is stored in a few numbers whatever its size; any other numbering is a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import row_major_strides
from ckptengine.layout.documents import integer, integers, member, texts

MAX_RANKS = 1 << 24
"""No mesh is larger; a document that claims one is refused before anything is allocated."""

_MAX_AXES = 32


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Ranks ``start + sum(coordinate[i] * strides[i])``; positive strides under which no two coordinates collide."""

    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mesh:
    """``ranks``: the global rank at every coordinate, row-major; None numbers them from 0.

    A sequence of ranks is kept as `Arithmetic` where it is one.  `LayoutError` for a mesh that is empty, too large, or
    has a rank twice.
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    ranks: Arithmetic | tuple[int, ...] | None = None
    _coordinates: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.axis_names) != len(self.shape) or len(set(self.axis_names)) != len(self.axis_names):
            raise LayoutError(f"mesh of shape {self.shape} needs as many distinct axis names, not {self.axis_names}")
        if len(self.shape) > _MAX_AXES:
            raise LayoutError(f"mesh of {len(self.shape)} axes; at most {_MAX_AXES} are supported")
        if any(n < 1 for n in self.shape) or math.prod(self.shape) > MAX_RANKS:
            raise LayoutError(f"mesh of shape {self.shape}: every axis needs a rank, and at most {MAX_RANKS} in all")
        object.__setattr__(self, "ranks", self._normalised())

    def _normalised(self) -> Arithmetic | tuple[int, ...]:
        if self.ranks is None:
            return Arithmetic(0, row_major_strides(self.shape))
        if isinstance(self.ranks, Arithmetic):
            if len(self.ranks.strides) != len(self.shape) or not self._is_injective(self.ranks):
                raise LayoutError(f"mesh of shape {self.shape}: {self.ranks} does not number its ranks uniquely")
            return self.ranks
        table = tuple(self.ranks)
        if len(table) != self.size or min(table) < 0:
            raise LayoutError(f"mesh of shape {self.shape} needs {self.size} ranks from 0 on, not {len(table)}")
        self._coordinates.update((rank, i) for i, rank in enumerate(table))
        if len(self._coordinates) != len(table):
            raise LayoutError(f"mesh of shape {self.shape} holds a rank more than once")
        plain = row_major_strides(self.shape)
        strides = tuple(table[p] - table[0] if n > 1 else 1 for n, p in zip(self.shape, plain, strict=True))
        found = Arithmetic(table[0], strides)
        if self._is_injective(found) and np.array_equal(self._expand(found), np.array(table, np.int64)):
            self._coordinates.clear()
            return found
        return table

    def _is_injective(self, ranks: Arithmetic) -> bool:
        reach = 0
        for stride, n in sorted(zip(ranks.strides, self.shape, strict=True)):
            if n > 1 and stride <= reach:
                return False
            reach += (n - 1) * stride
        return ranks.start >= 0

    def _expand(self, ranks: Arithmetic) -> NDArray[np.int64]:
        grid = np.array([ranks.start], np.int64)
        for n, stride in zip(self.shape, ranks.strides, strict=True):
            grid = (grid[:, None] + np.arange(n, dtype=np.int64) * stride).reshape(-1)
        return grid

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def all_ranks(self) -> NDArray[np.int64]:
        """int64[size]: the ranks in row-major order of their coordinates."""
        if isinstance(self.ranks, Arithmetic):
            return self._expand(self.ranks)
        return np.array(self.ranks, np.int64)

    def rank_at(self, coordinate: Sequence[int]) -> int:
        """The global rank at a coordinate."""
        if isinstance(self.ranks, Arithmetic):
            return self.ranks.start + sum(c * s for c, s in zip(coordinate, self.ranks.strides, strict=True))
        assert self.ranks is not None
        return self.ranks[sum(c * s for c, s in zip(coordinate, row_major_strides(self.shape), strict=True))]

    def coordinate_of(self, rank: int) -> tuple[int, ...] | None:
        """The coordinate of a global rank; None where the mesh does not hold it."""
        if not isinstance(self.ranks, Arithmetic):
            place = self._coordinates.get(rank)
            return None if place is None else unravel(place, self.shape)
        rest = rank - self.ranks.start
        coordinate = [0] * len(self.shape)
        for axis in sorted(range(len(self.shape)), key=lambda axis: -self._stride(axis)):
            if self.shape[axis] > 1:
                coordinate[axis] = min(max(rest, 0) // self._stride(axis), self.shape[axis] - 1)
                rest -= coordinate[axis] * self._stride(axis)
        return None if rest else tuple(coordinate)

    def _stride(self, axis: int) -> int:
        assert isinstance(self.ranks, Arithmetic)
        return self.ranks.strides[axis]

    def to_json(self) -> dict[str, object]:
        """A JSON document, a few numbers for an arithmetic mesh."""
        document: dict[str, object] = {"shape": list(self.shape), "axes": list(self.axis_names)}
        if not isinstance(self.ranks, Arithmetic):
            document["ranks"] = list(self.ranks or ())
        elif self.ranks != Arithmetic(0, row_major_strides(self.shape)):
            document["start"] = self.ranks.start
            document["strides"] = list(self.ranks.strides)
        return document

    @classmethod
    def from_json(cls, document: object) -> Mesh:
        """The mesh of a document; `LayoutError` for anything malformed."""
        shape = integers(member(document, "shape", "mesh"), "mesh shape", most=MAX_RANKS)
        names = texts(member(document, "axes", "mesh"), "mesh axes")
        assert isinstance(document, dict)
        if "ranks" in document:
            return cls(shape, names, integers(document["ranks"], "mesh ranks"))
        if "start" in document:
            strides = integers(member(document, "strides", "mesh"), "mesh strides")
            return cls(shape, names, Arithmetic(integer(document["start"], "mesh start"), strides))
        return cls(shape, names)


def unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The row-major coordinate of position ``place`` in a grid of ``shape``."""
    coordinate: list[int] = []
    for n in reversed(shape):
        place, c = divmod(place, n)
        coordinate.append(c)
    return tuple(reversed(coordinate))
