"""torch's element types by name, and the raw bytes of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptengine.errors import UnsupportedValue
from ckptengine.layout.dtypes import ITEMSIZE

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: dtype for name in ITEMSIZE if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
"""Every element type that can be stored and that this torch knows, by the name used in checkpoints."""

ALL_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""Every dtype of this torch, storable or not; a dtype can be a plain value of the state."""

_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The stored name of ``dtype``; `UnsupportedValue` for one that cannot be stored (quantized, sub-byte)."""
    name = _NAMES.get(dtype)
    if name is None:
        raise UnsupportedValue(
            f"tensors of {dtype} cannot be stored; convert to one of: {', '.join(TORCH_DTYPES)}, or save its parts"
        )
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The dtype stored as ``name``; `UnsupportedValue` where this torch has no such dtype."""
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise UnsupportedValue(f"this torch ({torch.__version__}) has no element type {name!r}")
    return dtype


@dataclass(frozen=True, slots=True)
class Memory:
    """Where a strided tensor's elements lie.

    ``address`` is that of the first element (0 for an empty tensor), ``strides_bytes`` has one entry per dimension,
    ``size_bytes`` counts the elements only, ``span_bytes`` reaches from the first to the last byte touched.
    """

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    itemsize_bytes: int
    size_bytes: int
    span_bytes: int
    is_contiguous: bool


def tensor_memory(tensor: torch.Tensor) -> Memory:
    """The memory of a strided ``tensor``; valid as long as its storage is neither freed nor resized."""
    item = tensor.element_size()
    shape = tuple(tensor.shape)
    strides = tuple(stride * item for stride in tensor.stride())
    size = tensor.numel() * item
    span = item + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if size else 0
    return Memory(tensor.data_ptr(), shape, strides, item, size, span, tensor.is_contiguous())


def tensor_bytes_view(tensor: torch.Tensor) -> torch.Tensor:
    """A flat ``uint8`` view of a contiguous ``tensor``'s own memory (no copy); `ValueError` if it is not contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"a byte view needs a contiguous tensor, not strides {tensor.stride()}")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("a byte view needs a resolved tensor, not a lazy conjugate or negative")
    return tensor.detach().reshape(-1).view(torch.uint8)
