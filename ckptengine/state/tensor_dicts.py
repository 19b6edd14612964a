"""Dicts of tensors and nothing else, confirmed as columns: with very many small tensors they are the whole walk."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch

from ckptengine.state.encoding import Json
from ckptengine.state.laid import PLAIN_TYPES, can_turn

FEW = 8
"""Dicts with fewer entries are walked entry by entry."""


def is_tensor_dict(value: dict[Any, Any]) -> bool:
    """Whether a dict holds plain tensors only, and enough of them."""
    return len(value) >= FEW and set(map(type, value.values())) <= PLAIN_TYPES


class TensorDict:
    """A dict of plain tensors as a walk found it, and the encoding of its entries."""

    __slots__ = ("_addresses", "_complex", "_dtypes", "_keys", "_shapes", "_tensors", "_turning", "items")

    def __init__(self, value: dict[Any, Any], items: Json) -> None:
        self.items = items
        self._keys = list(value)
        self._tensors: list[torch.Tensor] = list(value.values())
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        shared: dict[torch.Size, torch.Size] = {}
        self._shapes = [shared.setdefault(tensor.shape, tensor.shape) for tensor in self._tensors]
        self._dtypes = [tensor.dtype for tensor in self._tensors]
        self._complex = [tensor for tensor in self._tensors if tensor.dtype.is_complex]
        turning = {shape for shape in shared if can_turn(shape)}
        self._turning = [(tensor, tensor.stride()) for tensor in self._tensors if tensor.shape in turning]

    def __len__(self) -> int:
        return len(self._keys)

    def is_same(self, value: dict[Any, Any]) -> bool:
        """Whether ``value`` has the same tensors, lying as they did, under the same keys in the same order."""
        return (
            len(value) == len(self._keys)
            and all(map(is_, value.values(), self._tensors))
            and (all(map(is_, value, self._keys)) or self._has_keys(list(value)))
            and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
            and [tensor.shape for tensor in self._tensors] == self._shapes
            and [tensor.dtype for tensor in self._tensors] == self._dtypes
            and all(tensor.stride() == strides for tensor, strides in self._turning)
            and not any(map(torch.Tensor.is_conj, self._complex))
            and not any(map(torch.Tensor.is_neg, self._tensors))
        )

    def _has_keys(self, keys: list[Any]) -> bool:
        """Equal keys of equal types: 1, 1.0 and True are one key of a dict and three names."""
        return keys == self._keys and list(map(type, keys)) == list(map(type, self._keys))
