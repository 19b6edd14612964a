"""A checkpoint in memory: logical tensors and values, made from flat states and filled into live ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ckptengine.layout.box import Box
from ckptengine.state.decoding import loads
from ckptengine.state.dtypes import torch_dtype
from ckptengine.state.encoding import dumps
from ckptengine.state.fill import Filling, SavedState, prepare
from ckptengine.state.flatten import flatten
from ckptengine.state.leaves import FlatState


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in zip(box.offsets, box.ends, strict=True))


def region(local: torch.Tensor, piece: Any) -> torch.Tensor:
    return local.as_strided(piece.box.shape, piece.strides, piece.start)


def through_text(data: Any) -> Any:
    """As a manifest does: with sorted keys."""
    return loads(json.dumps(data, sort_keys=True, allow_nan=False))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as a dtype that every copy supports."""
    return tensor.view(_INTEGERS[tensor.element_size()])


class MemoryCheckpoint:
    """Logical tensors assembled from the leaves of one or more ranks; values go through JSON text."""

    def __init__(self, *flats: FlatState) -> None:
        self.data: dict[str, torch.Tensor] = {}  # as integers of the same size
        self.dtypes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.values = through_text(flats[0].values)
        self.rank_values = [through_text(flat.rank_values) for flat in flats]
        for flat in flats:
            self.aliases.update(flat.aliases)
            for leaf in flat.tensors:
                self.add(leaf)

    def add(self, leaf: Any) -> None:
        if leaf.name not in self.data:
            self.data[leaf.name] = torch.zeros(leaf.global_shape, dtype=as_integers(leaf.tensor).dtype)
            self.dtypes[leaf.name] = leaf.dtype
        local = as_integers(leaf.tensor).clone(memory_format=torch.contiguous_format).reshape(-1)
        for piece in leaf.pieces:
            self.data[leaf.name][slices(piece.box)] = region(local, piece)

    def saved(self, rank: int = 0) -> SavedState:
        tensors = {name: (self.dtypes[name], tuple(tensor.shape)) for name, tensor in self.data.items()}
        return SavedState(tensors, self.aliases, self.values, self.rank_values[rank])

    def restore(self, state: object, *, rank: int = 0, names: Sequence[str] | None = None, **options: Any) -> Filling:
        filling = prepare(state, self.saved(rank), names=names, **options)
        for target in filling.targets:
            destination = as_integers(target.tensor)
            local = destination.clone(memory_format=torch.contiguous_format).reshape(-1)
            for piece in target.pieces:
                region(local, piece).copy_(self.data[target.name][slices(piece.box)])
            destination.copy_(local.reshape(destination.shape))
        filling.commit()
        return filling

    def tensor(self, name: str) -> torch.Tensor:
        return self.data[name].view(torch_dtype(self.dtypes[name]))


def save(state: object, *, random: bool = False) -> MemoryCheckpoint:
    return MemoryCheckpoint(flatten(state, random=random))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(as_integers(a), as_integers(b))


def assert_same_state(a: object, b: object) -> None:
    """Both states have the same names, bytes and values."""
    first, second = save(a), save(b)
    assert dumps(first.values) == dumps(second.values)
    assert first.aliases == second.aliases
    assert list(first.data) == list(second.data)
    for name, tensor in first.data.items():
        assert first.dtypes[name] == second.dtypes[name], name
        assert torch.equal(tensor, second.data[name]), name
