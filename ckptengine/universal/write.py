"""Write logical tensors as a consolidated zarr v3 hierarchy that stock zarr-python, tensorstore and xarray read.

One array per tensor, values and provenance in attributes.  See ``docs/zarr.md`` for the exact shape of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources import jsonvalues
from ckptengine.sources.stream import buffer_bytes, in_file_order, stream_boxes, stream_memory_bytes
from ckptengine.sources.writer import Document, Job, Sink, Target, Unit
from ckptengine.universal.chunks import (
    MISSING,
    SEPARATOR,
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
from ckptengine.universal.metadata import ATTRIBUTE, VERSION, Json, array_document, consolidated_text, group_document
from ckptengine.universal.names import NameTree

UNIT_BYTES = 256 << 20
"""Small tensors are written together in units of about this size ..."""

UNIT_TENSORS = 1000
"""... and at most this many."""

SMALL_BYTES = 1 << 20
"""Arrays of one chunk up to this size are read together and written whole."""

REMOTE_THREADS = 16
"""Metadata is written by so many threads where each file is a request."""


class ZarrWriter:
    """The writer of ``--to zarr``."""

    format = "zarr"
    options = Encoding.names()
    ranked = False

    def __init__(self) -> None:
        self._seen: tuple[Sequence[str], NameTree] | None = None
        self._written: tuple[NameTree | None, Mapping[str, str]] = (None, {})

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
                units.append(_group_unit(group, encoding, stream_memory_bytes(job)))
                group, size_bytes = [], 0
        if group:
            units.append(_group_unit(group, encoding, stream_memory_bytes(job)))
        return units

    def write(self, job: Job, unit: Unit, target: Target) -> Document:
        """The files of one unit."""
        encoding = Encoding.of(job.options)
        if "#" in unit.key:
            path, _, tail = unit.key.partition("#")
            tensor = job.tensor(unit.tensors[0])
            index = tuple(map(int, tail.split(".")))
            _write_file(job, tensor, cut_of(tensor, encoding, job.chunk_bytes), index, path, encoding, target)
            return {}
        paths = self._paths(job)
        whole: list[str] = []
        small_bytes = min(SMALL_BYTES, buffer_bytes(job))
        for name in unit.tensors:
            tensor = job.tensor(name)
            cut = cut_of(tensor, encoding, job.chunk_bytes)
            if cut.inner == tensor.shape and tensor.nbytes <= small_bytes:
                whole.append(name)
                continue
            for index in cut.files(tensor.shape):
                _write_file(job, tensor, cut, index, paths[name], encoding, target)
        _write_whole(job, whole, paths, encoding, target)
        return {}

    def _paths(self, job: Job) -> Mapping[str, str]:
        tree = self._tree(job)
        if self._written[0] is not tree:
            self._written = (tree, {name: path for path, name in tree.arrays.items()})
        return self._written[1]

    def finish(self, job: Job, results: Mapping[str, Document], target: Target) -> None:
        """All metadata; the root, which makes it a hierarchy, last."""
        encoding = Encoding.of(job.options)
        tree = self._tree(job)
        nodes = {group: json.dumps(group_document()) for group in sorted(tree.groups) if group}
        for path, name in sorted(tree.arrays.items()):
            tensor = job.tensor(name)
            cut = cut_of(tensor, encoding, job.chunk_bytes)
            document = array_document(
                tensor,
                path,
                cut.outer,
                registered=encoding.registered,
                codecs=codecs_of(cut, encoding),
                attributes={"digest": job.digests[name]} if name in job.digests else {},
                separator=SEPARATOR,
            )
            nodes[path] = json.dumps(document)

        def put(paths: Sequence[str]) -> None:
            for path in paths:
                target.put(f"{path}/zarr.json", nodes[path].encode())

        ordered = list(nodes)
        threads = 1 if target.local_path("zarr.json") is not None else REMOTE_THREADS
        with ThreadPoolExecutor(threads, thread_name_prefix="ckptengine-convert") as pool:
            list(pool.map(put, (ordered[start::threads] for start in range(threads))))
        root = group_document({ATTRIBUTE: _root_attributes(job)})
        target.put("zarr.json", consolidated_text(root, nodes).encode())


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


def _group_unit(group: list[tuple[str, LogicalTensor, Cut]], encoding: Encoding, streamed_bytes: int) -> Unit:
    return Unit(
        key=group[0][0],
        tensors=tuple(tensor.name for _, tensor, _ in group),
        read_bytes=sum(tensor.nbytes for _, tensor, _ in group),
        write_bytes=sum(padded_bytes(tensor, cut) for _, tensor, cut in group),
        memory_bytes=max(
            streamed_bytes, *(_memory_bytes(cut, itemsize(tensor.dtype), encoding) for _, tensor, cut in group)
        ),
        files=tuple(file_of(path, index) for path, tensor, cut in group for index in cut.files(tensor.shape)),
    )


def _write_whole(job: Job, names: Sequence[str], paths: Mapping[str, str], encoding: Encoding, target: Target) -> None:
    """Arrays that are one chunk each: they lie near each other in the source, and are read many at a time."""
    encode = compressor(encoding.compression)
    ordered = in_file_order(job, names)
    now = 0

    def begin(number: int) -> None:
        nonlocal now
        now = number

    def write(data: memoryview) -> None:
        name = ordered[now]
        target.put(file_of(paths[name], (0,) * len(job.tensor(name).shape)), encode(data))

    stream_boxes(job, [(name, Box.whole(job.tensor(name).shape)) for name in ordered], write, begin)


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
