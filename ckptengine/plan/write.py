"""Who writes what: every element once, bytes balanced over the ranks, one small rule per tensor.

The result is a pure function of the tensors in their order, so every rank computes it alone and all agree.  What is
stored is the rule per tensor, not the outcome per rank; `stored_pieces` expands it.  **That expansion is part of the
format**: `ASSIGNMENT_VERSION` changes with it, and earlier versions stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.documents import integer
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.piece import Piece
from ckptengine.layout.placement import Flat, Replicate
from ckptengine.layout.sharding import Layout, Sharding

ASSIGNMENT_VERSION = 1
SPLIT_BYTES = 16 << 20
"""Replicated tensors whose local part is larger are written in parts by all of their replicas."""
PACK_BYTES = 1 << 20
"""Small replicated tensors are given away together up to this size, so that a reader finds neighbours in one file."""
_PACKS_PER_REPLICA = 64


@dataclass(frozen=True, slots=True)
class Owner:
    """Member ``index`` of every replica group (modulo its size) writes what the group holds."""

    index: int


@dataclass(frozen=True, slots=True)
class SplitOverReplicas:
    """Every member of a replica group writes an aligned flat part of what the group holds."""


Writer = Owner | SplitOverReplicas


class Planned(NamedTuple):  # a tuple: there is one per tensor
    """What the assignment needs to know of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout


def assign_writers(
    tensors: Sequence[Planned], *, world: int, split_bytes: int = SPLIT_BYTES, pack_bytes: int = PACK_BYTES
) -> tuple[Writer, ...]:
    """One writer rule per tensor, in order.

    Tensors without replicas come first and have no choice; replicated ones are then given, largest first, to the
    replica whose most loaded rank has least to write.  Deterministic in its arguments.  `LayoutError` for a rank that
    is not below ``world``.
    """
    loads = np.zeros(world, np.int64)
    writers: list[Writer] = [Owner(0)] * len(tensors)
    replicated: dict[Layout, list[_Choice]] = {}
    grids: dict[Layout, NDArray[np.int64]] = {}
    kinds: dict[tuple[int, tuple[int, ...], str], _Kind] = {}
    for i, tensor in enumerate(tensors):
        # By identity: tensors of one layout share it, and hashing a layout costs more than all the rest.
        key = (id(tensor.layout), tensor.shape, tensor.dtype)
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _kind(tensor, grids, world, split_bytes)
            if kind.rule is None:
                kind.choices = replicated.setdefault(tensor.layout, [])
        kind.count += 1
        if kind.rule is None:
            kind.choices.append(_Choice(kind.grid, kind.load, kind.largest, [i]))
        else:
            writers[i] = kind.rule
    for kind in kinds.values():
        if kind.rule is not None:
            np.add.at(loads, kind.grid, kind.load * kind.count)
    packs = [pack for choices in replicated.values() for pack in _packed(choices, pack_bytes)]
    for choice in sorted(packs, key=lambda choice: -choice.largest):
        index = int((loads[choice.grid] + choice.load).max(axis=1, initial=0).argmin())
        np.add.at(loads, choice.grid[index], choice.load[index])
        for i in choice.members:
            writers[i] = Owner(index)
    return tuple(writers)


@dataclass(slots=True)
class _Kind:
    """What tensors of one layout, shape and dtype have in common; see `_Choice`.  ``rule`` None: there is a choice."""

    grid: NDArray[np.int64]
    load: NDArray[np.int64]
    largest: int
    rule: Writer | None
    count: int = 0
    choices: list[_Choice] = field(default_factory=list)


def _kind(tensor: Planned, grids: dict[Layout, NDArray[np.int64]], world: int, split_bytes: int) -> _Kind:
    grid, held = _holdings(tensor, grids)
    if grid.size and not 0 <= int(grid.min()) <= int(grid.max()) < world:
        raise LayoutError(f"tensor {tensor.name!r} lies on rank {int(grid.max())} of a world of {world} ranks")
    load = held * itemsize(tensor.dtype)
    largest = int(load.max(initial=0))
    if len(grid) == 1:
        return _Kind(grid, load, largest, Owner(0))
    if largest > split_bytes and can_split(tensor.layout):
        return _Kind(grid, -(-load // len(grid)), largest, SplitOverReplicas())
    return _Kind(grid, load, largest, None)


@dataclass(slots=True)
class _Choice:
    """Tensors given away together: ``grid[k]`` are the ranks that would write ``load[k]`` bytes each under owner k."""

    grid: NDArray[np.int64]
    load: NDArray[np.int64]
    largest: int
    members: list[int]


def _packed(choices: Sequence[_Choice], pack_bytes: int) -> list[_Choice]:
    """Neighbours of one sharding joined while they are small, beside what they make together as well."""
    total = sum(choice.largest for choice in choices)
    limit = min(pack_bytes, total // (len(choices[0].grid) * _PACKS_PER_REPLICA))
    packs: list[_Choice] = []
    for choice in choices:
        last = packs[-1] if packs else None
        if last is None or last.largest + choice.largest > limit:
            packs.append(_Choice(choice.grid, choice.load.copy(), choice.largest, list(choice.members)))
        else:
            last.load += choice.load
            last.members += choice.members
            last.largest += choice.largest
    return packs


def _holdings(tensor: Planned, grids: dict[Layout, NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ranks, elements), both int64[replicas, shards]: what each rank holds, one row per choice of owner."""
    layout = tensor.layout
    if isinstance(layout, Irregular):
        groups = sorted({layout.replica_group(rank) for rank in layout.holders()})
        most = max((len(group) for group in groups), default=1)
        grid = np.array([[group[k % len(group)] for group in groups] for k in range(most)], np.int64)
        held = [sum(piece.size for piece in layout.pieces(group[0], tensor.shape)) for group in groups]
        return grid.reshape(most, len(groups)), np.tile(np.array(held, np.int64), (most, 1))
    mesh = layout.mesh
    axes = [axis for axis, placement in enumerate(layout.placements) if isinstance(placement, Replicate)]
    order = axes + [axis for axis in range(len(mesh.shape)) if axis not in axes]
    rows = layout.replica_count()
    if layout not in grids:
        grids[layout] = mesh.all_ranks().reshape(mesh.shape).transpose(order).reshape(rows, -1)
    return grids[layout], layout.local_sizes(tensor.shape).transpose(order).reshape(rows, -1)


def can_split(layout: Layout) -> bool:
    """Whether the replicas of a sharding can each write a part: a mesh without a flat cut of its own."""
    return isinstance(layout, Sharding) and not any(isinstance(p, Flat) for p in layout.placements)


def stored_pieces(layout: Layout, writer: Writer, shape: Sequence[int], rank: int) -> tuple[Piece, ...]:
    """What ``rank`` writes of a tensor, in the order of the format; positions are those of its live local tensor."""
    if isinstance(writer, SplitOverReplicas):
        return _split(layout).pieces(rank, shape)
    place = layout.replica_index(rank)
    if place is None or place != writer.index % layout.replica_count(rank):
        return ()
    return layout.pieces(rank, shape)


def stored_overlapping(
    layout: Layout, writer: Writer, shape: Sequence[int], box: Box
) -> Iterator[tuple[int, int, Piece]]:
    """(rank, ordinal in `stored_pieces`, piece) of everything stored that shares an element with ``box``."""
    if isinstance(writer, SplitOverReplicas):
        return _split(layout).overlapping(box, shape)
    return layout.overlapping(box, shape, replica=writer.index)


def writer_to_json(writer: Writer) -> object:
    """An owner's index, or ``"split"``."""
    return "split" if isinstance(writer, SplitOverReplicas) else writer.index


def writer_from_json(document: object) -> Writer:
    """The rule of a document; `LayoutError` for anything else."""
    return SplitOverReplicas() if document == "split" else Owner(integer(document, "writer", most=(1 << 31) - 1))


def _split(layout: Layout) -> Sharding:
    if not isinstance(layout, Sharding):
        raise LayoutError("an irregular sharding cannot be split over its replicas")
    return layout.splitting_replicas()
