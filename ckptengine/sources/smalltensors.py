"""Small tensors inside of values, such as states of random streams: kept as plain values, and written again."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptengine.layout.box import row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.emit import Tensor, storage_of
from ckptengine.sources.plain import DROPPED
from ckptengine.sources.port import Files
from ckptengine.sources.stored import NUMPY_DTYPES, StoredTensor

CLASS = "torch.Tensor"
MAX_BYTES = 1 << 20
HELD = (np.ndarray, list, int, float)
"""What a tensor's elements are as plain values: an array, or what our own format makes of one."""


def as_plain(tensor: StoredTensor, files: Files) -> object:
    """A dict with the class, the type and the elements of a tensor of up to `MAX_BYTES`; `DROPPED` for others."""
    if tensor.dtype not in NUMPY_DTYPES or tensor.nbytes > MAX_BYTES:
        return DROPPED
    return {"__class__": CLASS, "dtype": f"torch.{tensor.dtype}", "data": tensor.to_numpy(files)}


def as_stored(value: object, first: int = 0) -> tuple[Any, list[bytes]]:
    """A value whose dicts of `as_plain` are tensors again, and the bytes of their storages, numbered from ``first``."""
    data: list[bytes] = []

    def convert(item: Any) -> Any:
        if isinstance(item, dict):
            dtype = str(item.get("dtype")).removeprefix("torch.")
            if item.get("__class__") == CLASS and dtype in NUMPY_DTYPES and isinstance(item.get("data"), HELD):
                return _tensor(np.asarray(item["data"], NUMPY_DTYPES[dtype]), first, data)
            return {key: convert(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            made = [convert(part) for part in item]
            return made if isinstance(item, list) else tuple(made)
        return item

    return convert(value), data


def _tensor(array: np.ndarray, first: int, data: list[bytes]) -> Tensor:
    dtype = array.dtype.name
    storage = storage_of(str(first + len(data)), dtype, array.nbytes, itemsize(dtype))
    data.append(array.tobytes())
    return Tensor(storage, dtype, array.shape, row_major_strides(array.shape))
