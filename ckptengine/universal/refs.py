"""A view exported as a reference document: stock zarr and fsspec open it with nothing of ours installed.

The document (kerchunk's version 1) maps each key of the hierarchy to text, or to a byte range of a file of the
checkpoint.  It holds no tensor data, apart from tensors of a few kilobytes that are no single range anywhere.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources import jsonvalues
from ckptengine.sources.port import Source
from ckptengine.universal.grid import Grid, chunk_box, chunk_counts, contiguous_grid
from ckptengine.universal.metadata import ATTRIBUTE, VERSION, array_document, chunk_key, consolidated, group_document
from ckptengine.universal.names import NameTree
from ckptengine.universal.readers import MakesReader

INLINE_BYTES = 4096
"""Tensors up to this size may be written into the document where they are no byte range of a file."""

TARGET_BYTES = 64 << 20
"""Chunks are at most this large where a divisor of the shape allows."""


def refs(source: Source, reader: MakesReader) -> dict[str, Any]:
    """The reference document of a source.

    bfloat16, float8 and complex32 are integers of the same size, with the true type in the attribute ``ckptengine``.
    Raises `LayoutError` naming the tensors that cannot be cut into contiguous byte ranges, or are not covered exactly.
    """
    tree = NameTree(source.names())
    found: dict[str, Any] = {}
    nodes: dict[str, Any] = {group: group_document() for group in sorted(tree.groups) if group}
    refused: list[str] = []
    for path, name in sorted(tree.arrays.items()):
        tensor = source.tensor(name)
        grid = contiguous_grid(tensor, TARGET_BYTES)
        if grid is None and tensor.nbytes > INLINE_BYTES:
            refused.append(name)
            continue
        chunk = tensor.shape if grid is None else grid.shape
        nodes[path] = array_document(tensor, path, [max(1, n) for n in chunk], registered=False)
        if grid is not None:
            prove_cover(name, tensor.shape, [fragment.box for fragment in tensor.fragments])
            found.update(_ranges(source, path, tensor, grid))
        elif tensor.size:
            found.update(_inline(source, path, tensor, reader))
    if refused:
        shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        raise LayoutError(
            f"{source.files.root}: {len(refused)} of {len(tree.arrays)} tensors cannot be cut into chunks that are "
            f"contiguous in a file ({shown}); use the zarr view, or convert the checkpoint to zarr"
        )
    ours: dict[str, Any] = {"version": VERSION, "format": source.format, "step": source.step}
    ours["metrics"] = jsonvalues.to_json(dict(source.metrics))
    root = consolidated(group_document({ATTRIBUTE: ours}), nodes)
    texts = {f"{path}/zarr.json": json.dumps(node) for path, node in nodes.items()}
    return {"version": 1, "refs": {"zarr.json": json.dumps(root), **texts, **found}}


def _inline(source: Source, path: str, tensor: LogicalTensor, reader: MakesReader) -> dict[str, Any]:
    data = bytearray(tensor.nbytes)
    reader(source, tensor).read(Box.whole(tensor.shape), memoryview(data), workers=1)
    return {f"{path}/{chunk_key([0] * len(tensor.shape))}": "base64:" + base64.b64encode(data).decode()}


def _ranges(source: Source, path: str, tensor: LogicalTensor, grid: Grid) -> Iterator[tuple[str, Any]]:
    """Each fragment is cut into its own chunks; no chunk crosses fragments, by construction of the grid."""
    item_bytes = itemsize(tensor.dtype)
    for fragment in tensor.fragments:
        counts = chunk_counts(grid.shape, fragment.box.shape)
        first = [o // c for o, c in zip(fragment.box.offsets, grid.shape, strict=True)]
        for local in np.ndindex(*counts):
            index = [a + b for a, b in zip(first, local, strict=True)]
            part = fragment.part(chunk_box(index, grid.shape, tensor.shape), item_bytes)
            nbytes = part.box.size * item_bytes
            where = _location(source, part.file, part.offset, nbytes)
            yield f"{path}/{chunk_key(index)}", where


def _location(source: Source, file: str, offset: int, nbytes: int) -> Any:
    local = source.files.local_path(file)
    if local is not None:
        return [f"file://{os.path.abspath(local)}", offset, nbytes]
    if "://" in source.files.root and not file.startswith(":"):
        return [f"{source.files.root.rstrip('/')}/{file}", offset, nbytes]
    return "base64:" + base64.b64encode(source.files.read(file, offset, nbytes)).decode()
