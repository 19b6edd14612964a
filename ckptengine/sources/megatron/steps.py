"""The optimizer's step, which Megatron keeps once, or once per group, beside its tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.stored import NUMPY_DTYPES, StoredTensor

_KEYS = ("common_step", "step")
MAX_DEPTH = 12


def common_step(optimizer: object, inline: InlineFiles) -> tuple[str, str] | None:
    """The element type and the path of the bytes of the one step that everything in ``optimizer`` agrees on.

    None where there is no step, or where there are several different ones.
    """
    found: list[tuple[float, str, bytes]] = []
    for value in _steps(optimizer, 0):
        if isinstance(value, StoredTensor):
            if value.size == 1 and value.dtype in NUMPY_DTYPES:
                data = value.read(inline)[: itemsize(value.dtype)]
                found.append((float(value.to_numpy(inline).reshape(())), value.dtype, data))
        elif isinstance(value, float):
            found.append((value, "float32", struct.pack("<f", value)))
        elif isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
            found.append((float(value), "int64", struct.pack("<q", value)))
    if not found or len({number for number, _, _ in found}) > 1:
        return None
    _, dtype, data = found[0]
    return dtype, inline.add(data)


def without_step(value: object) -> object:
    """``value`` without the tensor that keeps one step for all parameters, and without what holds nothing else."""
    if not isinstance(value, Mapping):
        return value
    kept = ((key, inner, without_step(inner)) for key, inner in value.items() if key != _KEYS[0])
    return {key: made for key, inner, made in kept if made or not inner or not isinstance(inner, Mapping)}


def _steps(value: object, depth: int) -> Iterator[object]:
    if depth > MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in _KEYS and not isinstance(inner, Mapping | list):
                yield inner
            else:
                yield from _steps(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _steps(inner, depth + 1)
