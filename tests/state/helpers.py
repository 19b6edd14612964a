"""A checkpoint in memory: logical tensors and values, made from flat states and filled into live ones."""

from __future__ import annotations

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


class MemoryCheckpoint:
    """Logical tensors assembled from the leaves of one or more ranks; values go through JSON text."""

    def __init__(self, *flats: FlatState) -> None:
        self.data: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.values = loads(dumps(flats[0].values))
        self.rank_values = [loads(dumps(flat.rank_values)) for flat in flats]
        for flat in flats:
            self.aliases.update(flat.aliases)
            for leaf in flat.tensors:
                self.add(leaf)

    def add(self, leaf: Any) -> None:
        if leaf.name not in self.data:
            self.data[leaf.name] = torch.zeros(leaf.global_shape, dtype=torch_dtype(leaf.dtype))
        local = leaf.tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        for piece in leaf.pieces:
            self.data[leaf.name][slices(piece.box)] = region(local, piece)

    def saved(self, rank: int = 0) -> SavedState:
        tensors = {
            name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in self.data.items()
        }
        return SavedState(tensors, self.aliases, self.values, self.rank_values[rank])

    def restore(self, state: object, *, rank: int = 0, names: Sequence[str] | None = None, **options: Any) -> Filling:
        filling = prepare(state, self.saved(rank), names=names, **options)
        for target in filling.targets:
            local = target.tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
            for piece in target.pieces:
                region(local, piece).copy_(self.data[target.name][slices(piece.box)])
            target.tensor.copy_(local.reshape(target.tensor.shape))
        filling.commit()
        return filling


def save(state: object, *, random: bool = False) -> MemoryCheckpoint:
    return MemoryCheckpoint(flatten(state, random=random))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same_state(a: object, b: object) -> None:
    """Both states have the same names, bytes and values."""
    first, second = save(a), save(b)
    assert dumps(first.values) == dumps(second.values)
    assert first.aliases == second.aliases
    assert list(first.data) == list(second.data)
    for name, tensor in first.data.items():
        assert same_bits(tensor, second.data[name]), name
