"""What flattening a state gives: tensor leaves, and everything else as encoded values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.piece import Piece
from ckptengine.layout.sharding import Layout
from ckptengine.state.encoding import Json

Role = Literal["parameter", "optimizer", "buffer", "other"]


class TensorLeaf(NamedTuple):  # quick to make: there may be a hundred thousand
    """One logical tensor and the part of it that this rank holds.

    ``tensor`` is a detached alias of the live local memory (or the only copy of a tensor that a hook made), any
    strides.  ``pieces`` say which boxes of the logical tensor its elements are, counted as if it were contiguous.
    ``sharding`` is None for a plain tensor, which is a replica on every rank that has the name; an `Irregular` lists
    this rank only, and is complete once those of all ranks are merged.

    ``eager``: must be copied before `save` returns, because something other than an optimizer may change or free it
    (buffers, CPU scalars, memory shared with numpy, tensors of objects).
    ``owners``: ``id`` of each optimizer whose step overwrites it.
    ``follows``: those of another rank are kept where one leads, or comes first (`ckptengine.state.led`).
    """

    name: str
    tensor: torch.Tensor
    dtype: str
    global_shape: tuple[int, ...]
    sharding: Layout | None
    pieces: tuple[Piece, ...]
    role: Role
    eager: bool
    owners: tuple[int, ...]
    follows: bool = False

    @property
    def local_bytes(self) -> int:
        """Bytes of the elements that this rank holds."""
        return sum(piece.size for piece in self.pieces) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state as leaves.

    ``aliases`` maps the names of tied tensors to the name that is stored.  ``values`` is the typed encoding of all
    that is not a tensor, nested as it was; it must be equal on all ranks, up to modules and optimizers that only some
    ranks have (`ckptengine.state.merge`).  ``rank_values`` is what belongs to this rank alone:
    ``{"values": {name: encoded}, "random": {stream: encoded}}``.

    ``structure_key`` changes if and only if names, dtypes, shapes, shardings or ties do; it is the same on equal
    structures in other processes.
    """

    tensors: tuple[TensorLeaf, ...]
    aliases: Mapping[str, str]
    values: Json
    rank_values: Json
    structure_key: str
