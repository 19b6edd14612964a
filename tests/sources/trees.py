"""Tensors whose elements tell where they belong, and comparison of a source with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ckptengine.sources.port import Source

from .reading import compare

Truth = dict[str, tuple[str, list[int], str]]


def counting(*shape: int, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """Each element is its own row-major index plus ``start`` (modulo 251 for types of one byte)."""
    numbers = torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)
    if dtype.itemsize == 1:
        return (numbers % 2).bool() if dtype == torch.bool else (numbers % 251).to(torch.uint8).view(dtype)
    return numbers.to(dtype)


def raw(tensor: torch.Tensor) -> bytes:
    """The row-major bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def truth_of(tensors: Mapping[str, torch.Tensor]) -> Truth:
    """What `reading.compare` compares with."""
    return {
        name: (str(t.dtype).removeprefix("torch."), list(t.shape), hashlib.sha256(raw(t)).hexdigest())
        for name, t in tensors.items()
    }


def holds(source: Source, tensors: Mapping[str, torch.Tensor]) -> None:
    """The source has exactly these tensors, bit for bit."""
    compare(source, truth_of(tensors))
