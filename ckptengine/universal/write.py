"""Write logical tensors as a consolidated zarr v3 hierarchy that stock zarr-python, tensorstore and xarray read.

One array per tensor, values and provenance in attributes.  See ``docs/zarr.md`` for the exact shape of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources import jsonvalues
from ckptengine.sources.writer import Document, Job, Sink, Target, Unit
from ckptengine.universal.chunks import (
    MISSING,
    Cut,
    Encode,
    Encoding,
    codecs_of,
    compressor,
    cut_of,
    file_of,
    padded_bytes,
    shard_index,
    zeros_like_chunk,
)
from ckptengine.universal.grid import chunk_box
from ckptengine.universal.metadata import ATTRIBUTE, VERSION, Json, array_document, consolidated, group_document
from ckptengine.universal.names import NameTree

UNIT_BYTES = 256 << 20
"""Small tensors are written together in units of about this size ..."""

UNIT_TENSORS = 1000
"""... and at most this many."""


class ZarrWriter:
    """The writer of ``--to zarr``."""

    format = "zarr"

    def __init__(self) -> None:
        self._seen: tuple[Sequence[str], NameTree] | None = None

    def _tree(self, job: Job) -> NameTree:
        """The tree of a job's names; made once, since every unit needs it."""
        if self._seen is None or self._seen[0] is not job.names:
            self._seen = (job.names, NameTree(name for name in job.names if name not in job.aliases))
        return self._seen[1]

    def units(self, job: Job) -> Sequence[Unit]:
        """Small tensors in groups; each file of a large one by itself."""
        encoding = Encoding.of(job.options)
        tree = self._tree(job)
        units: list[Unit] = []
        group: list[tuple[str, LogicalTensor, Cut]] = []
        size_bytes = 0
        for path, name in tree.arrays.items():  # in the source's order, which is mostly that of its files
            tensor = job.tensor(name)
            cut = cut_of(tensor, encoding, job.chunk_bytes)
            if tensor.nbytes > UNIT_BYTES and cut.outer != cut.inner:
                units += [_file_unit(path, tensor, cut, index, encoding) for index in cut.files(tensor.shape)]
                continue
            group.append((path, tensor, cut))
            size_bytes += tensor.nbytes
            if size_bytes >= UNIT_BYTES or len(group) >= UNIT_TENSORS:
                units.append(_group_unit(group, encoding))
                group, size_bytes = [], 0
        if group:
            units.append(_group_unit(group, encoding))
        return units

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """The files of one unit."""
        encoding = Encoding.of(job.options)
        paths = {name: path for path, name in self._tree(job).arrays.items()} if len(unit.tensors) > 1 else {}
        for name in unit.tensors:
            tensor = job.tensor(name)
            cut = cut_of(tensor, encoding, job.chunk_bytes)
            if "#" in unit.key:
                path, _, tail = unit.key.partition("#")
                _write_file(job, tensor, cut, tuple(map(int, tail.split("."))), path, encoding, target)
                continue
            path = paths.get(name) or unit.key
            for index in cut.files(tensor.shape):
                _write_file(job, tensor, cut, index, path, encoding, target)
        return {}

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """All metadata; the root, which makes it a hierarchy, last."""
        encoding = Encoding.of(job.options)
        tree = self._tree(job)
        nodes: dict[str, Json] = {group: group_document() for group in sorted(tree.groups) if group}
        for path, name in sorted(tree.arrays.items()):
            tensor = job.tensor(name)
            cut = cut_of(tensor, encoding, job.chunk_bytes)
            attributes = {"digest": job.digests[name]} if name in job.digests else {}
            nodes[path] = array_document(
                tensor,
                path,
                cut.outer,
                registered=encoding.registered,
                codecs=codecs_of(cut, encoding),
                attributes=attributes,
            )
        for path, node in nodes.items():
            _write_json(target, f"{path}/zarr.json", node)
        _write_json(target, "zarr.json", consolidated(group_document({ATTRIBUTE: _root_attributes(job)}), nodes))


def _root_attributes(job: Job) -> Json:
    return {
        "version": VERSION,
        "step": job.step,
        "metrics": jsonvalues.to_json(dict(job.metrics)),
        "values": jsonvalues.to_json(job.values),
        **({} if job.encoded_values is None else {"live_values": job.encoded_values}),
        "aliases": dict(job.aliases),
        "provenance": dict(job.provenance),
    }


def _write_json(target: Target, path: str, document: Json) -> None:
    with target.create(path) as sink:
        sink.write(json.dumps(document, ensure_ascii=True).encode())


def _memory_bytes(cut: Cut, item_bytes: int, encoding: Encoding) -> int:
    chunk_bytes = math.prod(cut.inner) * item_bytes
    # The chunk, what it is compressed to, and the buffer of the file.
    return chunk_bytes * (2 if encoding.compression else 1) + (8 << 20) + 32 * math.prod(cut.inner_counts)


def _file_unit(path: str, tensor: LogicalTensor, cut: Cut, index: tuple[int, ...], encoding: Encoding) -> Unit:
    item_bytes = itemsize(tensor.dtype)
    box = chunk_box(index, cut.outer, tensor.shape)
    chunks = math.prod(-(-n // c) for n, c in zip(box.shape, cut.inner, strict=True))
    return Unit(
        key=f"{path}#{'.'.join(map(str, index))}",
        tensors=(tensor.name,),
        read_bytes=box.size * item_bytes,
        write_bytes=chunks * math.prod(cut.inner) * item_bytes + 16 * math.prod(cut.inner_counts) + 4,
        memory_bytes=_memory_bytes(cut, item_bytes, encoding),
        files=(file_of(path, index),),
    )


def _group_unit(group: list[tuple[str, LogicalTensor, Cut]], encoding: Encoding) -> Unit:
    return Unit(
        key=group[0][0],
        tensors=tuple(tensor.name for _, tensor, _ in group),
        read_bytes=sum(tensor.nbytes for _, tensor, _ in group),
        write_bytes=sum(padded_bytes(tensor, cut) for _, tensor, cut in group),
        memory_bytes=max(_memory_bytes(cut, itemsize(tensor.dtype), encoding) for _, tensor, cut in group),
        files=tuple(file_of(path, index) for path, tensor, cut in group for index in cut.files(tensor.shape)),
    )


def _write_file(
    job: Job, tensor: LogicalTensor, cut: Cut, index: tuple[int, ...], path: str, encoding: Encoding, target: Target
) -> None:
    """One outer chunk: its inner chunks one after another, then their index where it is a shard."""
    encode = compressor(encoding.compression)
    outer = Box(tuple(i * c for i, c in zip(index, cut.outer, strict=True)), cut.outer)
    entries: list[tuple[int, int]] = []
    with target.create(file_of(path, index)) as sink:
        chunk = zeros_like_chunk(cut, itemsize(tensor.dtype))
        for inner in np.ndindex(*cut.inner_counts):
            entries.append(_write_chunk(job, tensor, cut, outer, inner, chunk, encode, sink))
        if cut.sharded:
            sink.write(shard_index(entries))


def _write_chunk(
    job: Job,
    tensor: LogicalTensor,
    cut: Cut,
    outer: Box,
    inner: tuple[int, ...],
    chunk: npt.NDArray[Any],
    encode: Encode,
    sink: Sink,
) -> tuple[int, int]:
    """Read and append one inner chunk; returns its (offset, length) for the index."""
    offsets = tuple(o + i * c for o, i, c in zip(outer.offsets, inner, cut.inner, strict=True))
    shape = tuple(max(0, min(c, n - o)) for o, c, n in zip(offsets, cut.inner, tensor.shape, strict=True))
    if 0 in shape:
        return MISSING, MISSING
    octets = chunk.reshape(-1).view(np.uint8)
    if shape == cut.inner:
        job.read(tensor.name, Box(offsets, shape), octets.data)
    else:
        octets.fill(0)  # the padding at an edge
        job.read(tensor.name, Box(offsets, shape), chunk[tuple(slice(n) for n in shape)])
    data = encode(octets.data)
    start = sink.position
    sink.write(data)
    return start, len(data)


WRITER = ZarrWriter
