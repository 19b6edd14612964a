"""Small tensors inside of values, such as states of random streams: kept as plain values, and written again."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptengine.layout.box import row_major_strides
from ckptengine.layout.dtypes import ITEMSIZE, itemsize
from ckptengine.sources.emit import Tensor, storage_of
from ckptengine.sources.plain import DROPPED
from ckptengine.sources.port import Files
from ckptengine.sources.stored import NUMPY_DTYPES, StoredTensor

CLASS = "torch.Tensor"
MAX_BYTES = 1 << 20
HELD = (np.ndarray, list, int, float)
"""What a tensor's elements are as plain values: an array, or what our own format makes of one."""


def as_plain(tensor: StoredTensor, files: Files) -> object:
    """A dict with the class, the type and the elements of a tensor of up to `MAX_BYTES`; `DROPPED` for others.

    Elements of types that numpy lacks are unsigned numbers of the same bytes.
    """
    held = _element_type(tensor.dtype)
    if held is None or tensor.nbytes > MAX_BYTES:
        return DROPPED
    elements = np.frombuffer(tensor.read(files), held).reshape(tensor.shape)
    return {"__class__": CLASS, "dtype": f"torch.{tensor.dtype}", "data": elements}


def _element_type(dtype: str) -> np.dtype | None:
    """The numpy type of a tensor's elements as values; None for an unknown dtype."""
    return NUMPY_DTYPES.get(dtype) or (np.dtype(f"<u{ITEMSIZE[dtype]}") if dtype in ITEMSIZE else None)


def is_plain_tensor(value: object) -> bool:
    """Whether it is what `as_plain` makes of a tensor."""
    return (
        isinstance(value, dict)
        and value.get("__class__") == CLASS
        and _element_type(str(value.get("dtype")).removeprefix("torch.")) is not None
        and isinstance(value.get("data"), HELD)
    )


def as_stored(value: object, first: int = 0) -> tuple[Any, list[bytes]]:
    """A value whose dicts of `as_plain` are tensors again, and the bytes of their storages, numbered from ``first``."""
    data: list[bytes] = []

    def convert(item: Any) -> Any:
        if is_plain_tensor(item):
            dtype = item["dtype"].removeprefix("torch.")
            return _tensor(dtype, np.asarray(item["data"], _element_type(dtype)), first, data)
        if isinstance(item, dict):
            return {key: convert(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            made = [convert(part) for part in item]
            return made if isinstance(item, list) else tuple(made)
        return item

    return convert(value), data


def _tensor(dtype: str, array: np.ndarray, first: int, data: list[bytes]) -> Tensor:
    storage = storage_of(str(first + len(data)), dtype, array.nbytes, itemsize(dtype))
    data.append(array.tobytes())
    return Tensor(storage, dtype, array.shape, row_major_strides(array.shape))
