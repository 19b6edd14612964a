"""Registration: which regions of live memory a save reads, and private copies of what may change before the fence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ckptengine.layout.box import Box
from ckptengine.layout.piece import Piece
from ckptengine.snapshot.capture import LazySet
from ckptengine.snapshot.port import Extents
from ckptengine.snapshot.streams import Marks, cuda_devices, mark
from ckptengine.snapshot.witness import Watched, Witnesses
from ckptengine.state.collection import no_collection
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
    """What `save` leaves behind when it returns: the leaves, and copies of those that may not wait.

    Of those that may: the version counters and the witnesses, in ``rows`` by name.  ``marks``: what was queued on
    devices by then.
    """

    leaves: Sequence[TensorLeaf]
    copies: dict[str, torch.Tensor]
    rows: Mapping[str, int] = field(repr=False)
    versions: list[int] = field(repr=False)
    witnesses: Witnesses = field(repr=False)
    marks: Marks
    pool: EagerPool = field(repr=False)

    def release(self) -> None:
        """Give the copies back and let go of the live tensors."""
        for name, buffer in self.copies.items():
            self.pool.give_back(name, buffer)
        self.copies = {}
        self.leaves = ()


class Registrar:
    """Registers leaves for a save, and remembers which of them may wait while the walk finds the same ones."""

    def __init__(self) -> None:
        self._pool = EagerPool()
        self._leaves: Sequence[TensorLeaf] | None = None
        self._eager: list[TensorLeaf] = []
        self._rows: dict[str, int] = {}
        self._tensors: list[torch.Tensor] = []
        self._watched = Watched([])
        self._devices: tuple[int, ...] = ()

    def register(self, leaves: Sequence[TensorLeaf]) -> Registered:
        """Copy what may change before the fence, note the versions of the rest.  No device is synchronised."""
        if leaves is not self._leaves:
            self._look(leaves)
        copies = {leaf.name: self._pool.copy(leaf) for leaf in self._eager}
        versions = [tensor._version for tensor in self._tensors]
        marks = mark(self._devices)  # behind the copies
        return Registered(leaves, copies, self._rows, versions, self._watched.take(), marks, self._pool)

    def _look(self, leaves: Sequence[TensorLeaf]) -> None:
        with no_collection():
            waiting = [leaf for leaf in leaves if _may_wait(leaf)]
            self._rows = {leaf.name: row for row, leaf in enumerate(waiting)}
            self._tensors = [leaf.tensor for leaf in waiting]
            self._eager = [leaf for leaf in leaves if leaf.name not in self._rows]
            self._watched = Watched(self._tensors)
            self._devices = cuda_devices(leaf.tensor for leaf in leaves)
        self._leaves = leaves


def _may_wait(leaf: TensorLeaf) -> bool:
    """Whether a leaf is stable until the fence and can be read where it lies.

    Step counters are states of an optimizer like any other: only its step changes them, behind the fence.
    """
    stable = not leaf.eager or (leaf.role == "optimizer" and bool(leaf.owners) and leaf.tensor.is_cpu)
    return stable and _readable_in_place(leaf) and (leaf.tensor.is_cpu or _is_runs(leaf))


def _is_runs(leaf: TensorLeaf) -> bool:
    """What the engine copies from a device; anything else is made that on the device first."""
    return leaf.tensor.is_contiguous() and all(piece.is_contiguous for piece in leaf.pieces)


def _readable_in_place(leaf: TensorLeaf) -> bool:
    """Whether every piece is a strided view of the live tensor: any of a contiguous one, or one piece that is all."""
    return leaf.tensor.is_contiguous() or (
        len(leaf.pieces) == 1
        and leaf.pieces[0].start == 0
        and leaf.pieces[0].is_contiguous
        and leaf.pieces[0].box.shape == tuple(leaf.tensor.shape)
    )


class Planner:
    """Cuts registered leaves into the extents that a rank writes, and remembers the cut while nothing changes."""

    def __init__(self) -> None:
        self._of: tuple[object, object, frozenset[str]] | None = None
        self._extents: Extents | None = None
        self._keys = np.zeros((0, 2), np.uint32)
        self._lazy = LazySet([], [], {})
        self._copied: list[tuple[int, str, Piece]] = []

    def plan(
        self, registered: Registered, structure: Stored, rank: int
    ) -> tuple[Extents, npt.NDArray[np.uint32], LazySet]:
        """The extents, live ones first; their (tensor, piece) ordinals, uint32[n, 2]; and what reads live memory."""
        of = (registered.leaves, structure, frozenset(registered.copies))
        known = self._of
        same = known is not None and known[0] is of[0] and known[1] is of[1] and known[2] == of[2]
        if not same or self._extents is None:
            with no_collection():  # some objects per tensor, and they stay
                self._extents = self._cut(registered, structure, rank)
            self._of = of
        else:
            for number, name, piece in self._copied:
                self._extents.point(number, region_of(registered.copies[name], piece))
        return self._extents, self._keys, self._lazy

    def _cut(self, registered: Registered, structure: Stored, rank: int) -> Extents:
        regions: list[torch.Tensor] = []
        boxes: list[Box] = []
        shapes: list[tuple[int, ...]] = []
        keys: list[tuple[int, int]] = []
        lazy: list[int] = []
        leaves: list[TensorLeaf] = []
        self._copied = []
        for leaf in sorted(registered.leaves, key=lambda leaf: leaf.name in registered.copies):
            copy = registered.copies.get(leaf.name)
            ordinal = structure.ordinal(leaf.name)
            for number, piece in enumerate(structure.stored(ordinal, rank)):
                if not piece.box.size:
                    continue
                if copy is None:
                    lazy.append(len(regions))
                    leaves.append(leaf)
                else:
                    self._copied.append((len(regions), leaf.name, piece))
                keys.append((ordinal, number))
                regions.append(region_of(leaf.tensor if copy is None else copy, piece))
                boxes.append(piece.box)
                shapes.append(leaf.global_shape)
        self._keys = np.array(keys, np.uint32).reshape(-1, 2)
        self._lazy = LazySet(lazy, leaves, registered.rows)
        return Extents(regions, boxes, shapes)


def region_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The view of a local tensor that holds ``piece``; a non-contiguous one must be the piece."""
    if piece.start == 0 and piece.box.shape == tuple(tensor.shape) and piece.is_contiguous:
        return tensor
    if not tensor.is_contiguous():
        return tensor
    region = torch.as_strided(tensor, piece.box.shape, piece.strides, tensor.storage_offset() + piece.start)
    return region if region.is_cpu else region.contiguous()
