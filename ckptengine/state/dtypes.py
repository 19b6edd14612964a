"""torch's element types by name."""

from __future__ import annotations

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
