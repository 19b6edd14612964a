"""The header of a safetensors file, checked in full: no gap, no overlap, nothing outside of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ckptengine.errors import Damaged, Truncated, UnreadableFormat
from ckptengine.layout.dtypes import ITEMSIZE
from ckptengine.sources.port import Files

MAX_HEADER_BYTES = 1 << 30
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""The format's element types and torch's names for them."""


class Entry(NamedTuple):
    """A tensor of one file: torch's element type and shape, and the absolute offset of its first byte.

    A tuple, since a checkpoint has a hundred thousand of them.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors by stored name, and its free ``__metadata__``."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(files: Files, path: str, start: int = 0) -> Header:
    """The header of the safetensors data that begins at byte ``start`` of a file and ends where the file ends.

    Raises `UnreadableFormat` for what is no safetensors header, `Truncated` for a file that ends before its data, and
    `Damaged` for tensors that overlap, leave gaps or do not have the bytes that their shape needs.
    """
    shown = f"{files.root.rstrip('/')}/{path}"
    available = files.size(path) - start
    if available < 8:
        raise Truncated(f"{shown} has {max(available, 0)} bytes; a safetensors file has at least 8")
    length = int.from_bytes(files.read(path, start, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise UnreadableFormat(f"{shown} is no safetensors file: its header would have {length} bytes")
    if length > available - 8:
        raise Truncated(f"{shown} ends inside of its safetensors header of {length} bytes")
    text = files.read(path, start + 8, length)
    try:
        document = _parse(text.decode("utf-8"))
    except RecursionError:
        raise UnreadableFormat(f"{shown} is no safetensors file: its header is nested too deeply") from None
    except ValueError as error:
        raise UnreadableFormat(f"{shown} is no safetensors file, or its header is damaged: {error}") from None
    if not isinstance(document, dict):
        raise UnreadableFormat(f"{shown} is no safetensors file: its header is no JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableFormat(f"{shown}: __metadata__ must be strings under strings")
    return Header(_check(document, shown, start + 8 + length, available - 8 - length), metadata)


def _parse(text: str) -> Any:
    """The JSON, in which no name may occur twice."""
    document = json.loads(text)
    if not isinstance(document, dict) or text.count('"data_offsets"') != len(document) - ("__metadata__" in document):
        json.loads(text, object_pairs_hook=_unique)  # slow, and only needed where the count leaves a doubt
    return document


def _unique(pairs: list[tuple[str, object]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")


def _check(document: dict[str, Any], shown: str, base: int, nbytes: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, fields in document.items():
        try:
            kind, (begin, end), shape = fields["dtype"], fields["data_offsets"], tuple(fields["shape"])
            dtype = DTYPES.get(kind)
            proper = min(begin, end, *shape) >= 0 and {int}.issuperset(map(type, (begin, end, *shape)))
        except (KeyError, TypeError, ValueError):
            proper = False
        if not proper:
            raise UnreadableFormat(f"{shown}: tensor {name!r} lacks a proper dtype, shape or data_offsets")
        if dtype is None:
            raise UnreadableFormat(f"{shown}: tensor {name!r} has element type {kind!r}, which is not supported")
        if kind == "F4":  # the format counts half bytes, torch pairs of them
            if not shape or shape[-1] % 2:
                raise Damaged(f"{shown}: tensor {name!r} of F4 has an odd last dimension")
            shape = (*shape[:-1], shape[-1] // 2)
        if end - begin != math.prod(shape) * ITEMSIZE[dtype]:
            raise Damaged(f"{shown}: tensor {name!r} of {kind} {list(shape)} cannot have {end - begin} bytes")
        entries[name] = Entry(dtype, shape, base + begin)
        spans.append((begin, end, name))
    _check_spans(spans, shown, nbytes)
    return entries


def _check_spans(spans: list[tuple[int, int, str]], shown: str, nbytes: int) -> None:
    """The data is tiled by the tensors."""
    spans.sort()
    position = 0
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise Damaged(f"{shown}: tensor {name!r} at {begin} {what} (its data should begin at {position})")
        position = end
    if position > nbytes:
        raise Truncated(f"{shown} ends after {nbytes} bytes of data; its header says that there are {position}")
    if position < nbytes:
        raise Damaged(f"{shown} has {nbytes - position} bytes after its last tensor that belong to none")
