"""The element types that a logical tensor can have, by torch's own names without the ``torch.`` prefix."""

from __future__ import annotations

from ckptengine.errors import UnreadableFormat

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element.  Closed: a dtype that is not here is refused rather than guessed."""


def itemsize(dtype: str) -> int:
    """Bytes per element of ``dtype``; `UnreadableFormat` for a name that is not known."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise UnreadableFormat(f"unknown element type {dtype!r}; known: {', '.join(ITEMSIZE)}") from None
