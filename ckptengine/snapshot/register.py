"""Registration: which regions of live memory a save reads, and private copies of what may change before the fence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.piece import Piece
from ckptengine.snapshot.capture import Lazy, storage_of
from ckptengine.snapshot.port import Extent
from ckptengine.state.leaves import TensorLeaf


class Stored(Protocol):
    """The part of the agreed structure that registration needs."""

    def ordinal(self, name: str) -> int:
        """The number of a tensor in the agreed list."""

    def stored(self, ordinal: int, rank: int) -> tuple[Piece, ...]:
        """The pieces of a tensor that ``rank`` writes."""


class EagerPool:
    """Private copies of eager leaves, kept and reused so that no save allocates.

    A buffer serves one save at a time; as many sets exist as saves are in flight.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], list[torch.Tensor]] = {}

    def copy(self, leaf: TensorLeaf) -> torch.Tensor:
        """A contiguous copy of the leaf's local tensor, on its device."""
        key = (leaf.name, tuple(leaf.tensor.shape), leaf.tensor.dtype, leaf.tensor.device)
        free = self._free.get(key)
        buffer = free.pop() if free else torch.empty(key[1], dtype=key[2], device=key[3])
        return buffer.copy_(leaf.tensor)

    def give_back(self, name: str, buffer: torch.Tensor) -> None:
        key = (name, tuple(buffer.shape), buffer.dtype, buffer.device)
        self._free.setdefault(key, []).append(buffer)


@dataclass(slots=True)
class Registered:
    """What `save` leaves behind when it returns: the leaves, and copies of those that may not wait."""

    leaves: Sequence[TensorLeaf]
    copies: dict[str, torch.Tensor]
    versions: dict[str, int]
    pool: EagerPool = field(repr=False)

    def release(self) -> None:
        """Give the copies back and let go of the live tensors."""
        for name, buffer in self.copies.items():
            self.pool.give_back(name, buffer)
        self.copies = {}
        self.leaves = ()


def register(leaves: Sequence[TensorLeaf], pool: EagerPool) -> Registered:
    """Copy what may change before the fence, note the versions of the rest.  No device is synchronised."""
    copies: dict[str, torch.Tensor] = {}
    versions: dict[str, int] = {}
    for leaf in leaves:
        if leaf.eager or not _readable_in_place(leaf):
            copies[leaf.name] = pool.copy(leaf)
        else:
            versions[leaf.name] = leaf.tensor._version
    return Registered(leaves, copies, versions, pool)


def _readable_in_place(leaf: TensorLeaf) -> bool:
    """Whether every piece is a strided view of the live tensor: any of a contiguous one, or one piece that is all."""
    return leaf.tensor.is_contiguous() or (
        len(leaf.pieces) == 1
        and leaf.pieces[0].start == 0
        and leaf.pieces[0].is_contiguous
        and leaf.pieces[0].box.shape == tuple(leaf.tensor.shape)
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """The extents of one rank file: live ones first.  ``keys``: (tensor, piece) ordinals; ``addresses``: 0 for none."""

    extents: list[Extent]
    keys: list[tuple[int, int]]
    addresses: list[int]
    lazy: list[Lazy]


def extents_of(registered: Registered, structure: Stored, rank: int) -> Planned:
    """Cut the registered leaves into the extents that ``rank`` writes."""
    planned = Planned([], [], [], [])
    live = [leaf for leaf in registered.leaves if leaf.name not in registered.copies]
    copied = [leaf for leaf in registered.leaves if leaf.name in registered.copies]
    for leaf in (*live, *copied):
        tensor = registered.copies.get(leaf.name, leaf.tensor)
        ordinal = structure.ordinal(leaf.name)
        for number, piece in enumerate(structure.stored(ordinal, rank)):
            if piece.box.size:
                region = region_of(tensor, piece)
                if leaf.name in registered.versions:
                    planned.lazy.append(_lazy(leaf, len(planned.extents), registered.versions[leaf.name]))
                planned.keys.append((ordinal, number))
                planned.extents.append(_extent(leaf, piece, region))
                direct = region.is_contiguous() and region.device.type == "cpu"
                planned.addresses.append(region.data_ptr() if direct else 0)
    return planned


def region_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The view of a local tensor that holds ``piece``; a non-contiguous one must be the piece."""
    if tensor.is_contiguous():
        return torch.as_strided(tensor, piece.box.shape, piece.strides, tensor.storage_offset() + piece.start)
    return tensor


def _extent(leaf: TensorLeaf, piece: Piece, region: torch.Tensor) -> Extent:
    nbytes = piece.box.size * itemsize(leaf.dtype)
    return Extent(region=region, offset=0, nbytes=nbytes, box=piece.box, global_shape=leaf.global_shape)


def _lazy(leaf: TensorLeaf, extent: int, version: int) -> Lazy:
    return Lazy(
        extent, leaf.name, leaf.tensor, version, leaf.tensor.data_ptr(), storage_of(leaf.tensor), frozenset(leaf.owners)
    )
