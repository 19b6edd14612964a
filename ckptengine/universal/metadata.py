"""The ``zarr.json`` documents of a hierarchy: groups, arrays, and what of ours is in their attributes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.layout.tensor import LogicalTensor
from ckptengine.universal.datatypes import stored_type

ATTRIBUTE = "ckptengine"
"""The attribute that holds what is ours, on the root and on every array."""

VERSION = 1
"""Version of what is under the attribute; a reader refuses newer ones."""

BYTES_CODEC: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}

Json = dict[str, Any]


def group_document(attributes: Json | None = None) -> Json:
    """A group's ``zarr.json``."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(
    tensor: LogicalTensor,
    path: str,
    chunk: Sequence[int],
    *,
    registered: bool,
    codecs: Sequence[Json] | None = None,
    attributes: Mapping[str, object] | None = None,
    separator: str = "/",
) -> Json:
    """An array's ``zarr.json``; ``chunk`` is the shape of what one key holds, ``separator`` that of its keys.

    Dimensions have names (xarray opens nothing without), which are unique in a group, because tensors beside each
    other have nothing to do with each other's sizes.
    """
    kind = stored_type(tensor.dtype, registered)
    ours: Json = {"name": tensor.name, "dtype": tensor.dtype}
    if tensor.digest is not None:
        ours["digest"] = tensor.digest
    ours.update(attributes or {})
    parts = [part for part in path.split("/") if part]
    leaf = "_".join(parts[-1:]) or "array"
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(tensor.shape),
        "data_type": kind.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
        "fill_value": kind.fill_value,
        "codecs": list(codecs) if codecs is not None else [BYTES_CODEC],
        "attributes": {ATTRIBUTE: ours},
        "dimension_names": [f"{leaf}_{d}" for d in range(len(tensor.shape))],
        "storage_transformers": [],
    }


def consolidated(root: Json, nodes: Mapping[str, Json]) -> Json:
    """The root's document with all others inlined, by path, as zarr-python and xarray read them.

    Sorted, because zarr-python 3.1 loses members of a group that do not follow each other.
    """
    ordered = {path: nodes[path] for path in sorted(nodes)}
    return {**root, "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": ordered}}


def consolidated_text(root: Json, nodes: Mapping[str, str]) -> str:
    """The text of `consolidated` for nodes that are text already: of 100,000 arrays that is most of the work."""
    ordered = ", ".join(f"{json.dumps(path)}: {nodes[path]}" for path in sorted(nodes))
    whole = json.dumps(consolidated(root, {}))
    head, empty, tail = whole.rpartition('"metadata": {}')
    assert empty
    return f'{head}"metadata": {{{ordered}}}{tail}'


def chunk_key(index: Sequence[int], separator: str = "/") -> str:
    """The key of a chunk below its array: ``c/0/1``, or ``c`` for an array without dimensions."""
    return separator.join(["c", *map(str, index)])
