"""How a live tensor lies in memory, and whether it still does: its object may stay while all else changes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ckptengine.state.sharded import Sharded

Laid = tuple[torch.Tensor, int, torch.Size, torch.dtype, tuple[int, ...] | None]
"""The local tensor, its address, shape and element type, and its strides where the shape does not tell them apart."""


PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_DISABLED = torch.Tensor.__torch_dispatch__


def local_of(tensor: torch.Tensor | Sharded) -> torch.Tensor:
    """The tensor that has this rank's memory."""
    if isinstance(tensor, Sharded):
        return tensor.tensor
    if type(tensor) in PLAIN_TYPES:
        return tensor
    return held_by(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)


def held_by(tensor: torch.Tensor) -> torch.Tensor:
    """What a wrapper holds where that is all it is: one tensor of its shape, type and device (torchao's weights that
    are cast to float8 when FSDP2 gathers them).  Else ``tensor`` itself."""
    while (kind := type(tensor)) not in PLAIN_TYPES and not is_plain_subclass(kind):
        # Torch's own wrappers mean more: one waits for a collective, others are of its compiler.
        flatten: Any = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None or kind.__module__.startswith("torch."):
            break
        names, _ = flatten()
        inner = getattr(tensor, names[0]) if len(names) == 1 else None
        if not isinstance(inner, torch.Tensor) or _kind(inner) != _kind(tensor):
            break
        tensor = inner
    return tensor


def is_plain_subclass(kind: Any) -> bool:
    """Whether tensors of a class compute as any other, from memory of their own."""
    return kind.__torch_dispatch__ is _DISABLED


def _kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def laid_of(tensor: torch.Tensor | Sharded) -> Laid:
    """How a tensor lies now."""
    local = local_of(tensor)
    shape = local.shape
    return local, local.data_ptr(), shape, local.dtype, local.stride() if can_turn(shape) else None


def lies_elsewhere(tensor: torch.Tensor | Sharded, laid: Laid) -> bool:
    """Whether a tensor lies otherwise than it did, or is read otherwise.

    One whose memory holds the conjugates or negatives of its elements always is: its leaf is a copy, good once.
    """
    local, address, shape, dtype, strides = laid
    return (
        local.data_ptr() != address
        or local.shape != shape
        or local.dtype is not dtype
        or (local is not tensor and local_of(tensor) is not local)
        or (strides is not None and local.stride() != strides)
        or (dtype.is_complex and local.is_conj())
        or local.is_neg()
    )


@lru_cache(maxsize=65536)
def can_turn(shape: torch.Size) -> bool:
    """Whether dimensions can change places (``t_()``, ``p.data = p.data.T``) and leave the shape as it is."""
    long = [extent for extent in shape if extent > 1] if len(shape) > 1 else []
    return len(set(long)) < len(long)
