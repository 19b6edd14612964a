"""Witnesses: a few bytes of every large live tensor, kept from registration until it may change again.

A write to all of a tensor that comes before its bytes are captured and advances no version counter (``.data``, numpy,
DLPack) leaves nothing else to tell of it: what is captured then equals the memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping

import torch

from ckptengine.state.leaves import TensorLeaf

WINDOW_BYTES = 64
WITNESSED_BYTES = 16 << 10
"""From this size on a tensor has a witness: a write to all of a state touches large ones, and small ones are many."""

Witnesses = Mapping[str, tuple[int, bytes]]
"""By name: an address, and the bytes that were there."""


def places_of(leaves: Iterable[TensorLeaf]) -> list[tuple[str, int]]:
    """The names of leaves that have a witness, and the address of each: in the middle of the tensor."""
    return [(leaf.name, _middle(leaf.tensor)) for leaf in leaves if _has_witness(leaf.tensor)]


def take(places: Iterable[tuple[str, int]]) -> dict[str, tuple[int, bytes]]:
    """What is there now.  The tensors must lie where they did."""
    return {name: (address, ctypes.string_at(address, WINDOW_BYTES)) for name, address in places}


def belied(witnesses: Witnesses, names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose bytes are not what they were.  The tensors must lie where they did."""
    found = []
    for name in names:
        witness = witnesses.get(name)
        if witness is not None and ctypes.string_at(witness[0], WINDOW_BYTES) != witness[1]:
            found.append(name)
    return found


def _has_witness(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes >= WITNESSED_BYTES and tensor.is_contiguous()


def _middle(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + tensor.nbytes // 2 // WINDOW_BYTES * WINDOW_BYTES
