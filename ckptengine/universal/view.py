"""A checkpoint as a read-only zarr hierarchy that copies nothing: a zarr store whose chunks are read from fragments.

Metadata is made when it is asked for; a chunk that is one byte range is read as that range, and any other is assembled.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.group import AsyncGroup, GroupMetadata
from zarr.storage import StorePath

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources import jsonvalues
from ckptengine.sources.port import Source
from ckptengine.universal import registered as registered_types
from ckptengine.universal.direct import DirectPipeline
from ckptengine.universal.grid import Grid, chunk_box, chunk_counts, view_grid
from ckptengine.universal.metadata import ATTRIBUTE, VERSION, array_document, group_document
from ckptengine.universal.names import NameTree
from ckptengine.universal.readers import MakesReader, ReadsBoxes
from ckptengine.universal.readonly import ReadOnlyStore

CACHED_TENSORS = 256
"""Tensors whose grids and fragment indexes are kept."""


def open_view(source: Source, reader: MakesReader, *, registered: bool = True) -> zarr.Group:
    """The group of a source's tensors.

    ``registered`` gives bfloat16 and float8 as data types registered with zarr-python; without it they are integers
    of the same size.  The true type, the canonical name and the digest are in each array's attribute ``ckptengine``.
    """
    if registered:
        registered_types.register()
    store = CheckpointStore(source, reader, registered=registered)
    root = GroupMetadata.from_dict(store.document("zarr.json") or {})
    return zarr.Group(_LazyGroup(metadata=root, store_path=StorePath(store)))


class CheckpointStore(ReadOnlyStore):
    """A read-only zarr store over a source.  Keys that are neither metadata nor a chunk of a tensor do not exist."""

    def __init__(self, source: Source, reader: MakesReader, *, registered: bool = True) -> None:
        super().__init__(f"the view of {source.files.root} is read-only; convert it to zarr to change it")
        self.source = source
        self.registered = registered
        self.tree = NameTree(source.names())
        self._reader = reader
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, tuple[LogicalTensor, Grid, ReadsBoxes]] = OrderedDict()

    def document(self, key: str) -> dict[str, Any] | None:
        """The metadata document under a key, or None."""
        path, _, last = key.rpartition("/")
        if last != "zarr.json":
            return None
        if path in self.tree.arrays:
            tensor, grid, _ = self._opened(path)
            return array_document(tensor, path, grid.shape, registered=self.registered)
        if path in self.tree.groups:
            return group_document(self._root_attributes() if not path else None)
        return None

    def _root_attributes(self) -> dict[str, Any]:
        source = self.source
        ours: dict[str, Any] = {"version": VERSION, "format": source.format, "step": source.step}
        ours["metrics"] = jsonvalues.to_json(dict(source.metrics))
        return {ATTRIBUTE: ours}

    def _opened(self, path: str) -> tuple[LogicalTensor, Grid, ReadsBoxes]:
        with self._lock:
            if path in self._recent:
                self._recent.move_to_end(path)
                return self._recent[path]
        tensor = self.source.tensor(self.tree.arrays[path])
        opened = (tensor, view_grid(tensor), self._reader(self.source, tensor))
        with self._lock:
            self._recent[path] = opened
            while len(self._recent) > CACHED_TENSORS:
                self._recent.popitem(last=False)
        return opened

    def _chunk_of(self, key: str) -> tuple[LogicalTensor, Grid, ReadsBoxes, tuple[int, ...]] | None:
        split = self.tree.split_chunk_key(key)
        if split is None:
            return None
        path, rest = split
        parts = rest.split("/") if rest else []
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            return None
        tensor, grid, reader = self._opened(path)
        index = tuple(map(int, parts))
        if len(index) != len(tensor.shape):
            return None
        counts = chunk_counts(grid.shape, tensor.shape)
        return (tensor, grid, reader, index) if all(i < n for i, n in zip(index, counts, strict=True)) else None

    def origin(self, key: str) -> tuple[int, ...] | None:
        """The first element of the chunk under ``key`` in its tensor; None where there is no such chunk."""
        found = self._chunk_of(key)
        return None if found is None else tuple(i * c for i, c in zip(found[3], found[1].shape, strict=True))

    def read_box(self, key: str, box: Box, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with a box of the tensor that the chunk under ``key`` belongs to, past the chunks."""
        found = self._chunk_of(key)
        assert found is not None
        found[2].read(box, out)

    def _read(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        document = self.document(key)
        if document is not None:
            text = np.frombuffer(json.dumps(document).encode(), np.uint8)
            return prototype.buffer.from_array_like(_cut(text, byte_range))
        found = self._chunk_of(key)
        if found is None:
            return None
        tensor, grid, reader, index = found
        box = chunk_box(index, grid.shape, tensor.shape)
        if box.shape == grid.shape:
            data: npt.NDArray[Any] = np.empty(box.size * itemsize(tensor.dtype), np.uint8)
            reader.read(box, data.data, workers=1)
        else:  # an edge: zarr wants the whole chunk
            whole = np.zeros(grid.shape, _unit(itemsize(tensor.dtype)))
            reader.read(box, whole[tuple(slice(n) for n in box.shape)], workers=1)
            data = whole.reshape(-1).view(np.uint8)
        return prototype.buffer.from_array_like(_cut(data, byte_range))

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await asyncio.to_thread(self._read, key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        path, _, last = key.rpartition("/")
        if last == "zarr.json":
            return path in self.tree.arrays or path in self.tree.groups
        return self._chunk_of(key) is not None

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        path = prefix.strip("/")
        if path in self.tree.arrays or path in self.tree.groups:
            yield "zarr.json"
        for child in self.tree.children(path):
            yield child

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for group in sorted(self.tree.groups):
            key = f"{group}/zarr.json" if group else "zarr.json"
            if key.startswith(prefix):
                yield key
        for path in sorted(self.tree.arrays):
            if not (path.startswith(prefix) or prefix.startswith(path)):
                continue
            if f"{path}/zarr.json".startswith(prefix):
                yield f"{path}/zarr.json"
            tensor, grid, _ = self._opened(path)
            for index in np.ndindex(*chunk_counts(grid.shape, tensor.shape)):
                key = "/".join([path, "c", *map(str, index)])
                if key.startswith(prefix):
                    yield key

    async def getsize(self, key: str) -> int:
        found = self._chunk_of(key)
        if found is not None:
            tensor, grid, _, _ = found
            return math.prod(grid.shape) * itemsize(tensor.dtype)
        document = self.document(key)
        if document is None:
            raise FileNotFoundError(key)
        return len(json.dumps(document).encode())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CheckpointStore) and other.source is self.source and (other.registered == self.registered)
        )

    def __repr__(self) -> str:
        return f"CheckpointStore({self.source.format}: {self.source.files.root})"


class _LazyGroup(AsyncGroup):
    """An `AsyncGroup` that answers names and counts from the tree, without opening every member for it."""

    def _tree(self) -> NameTree:
        store = self.store_path.store
        assert isinstance(store, CheckpointStore)
        return store.tree

    async def getitem(self, key: str) -> Any:
        node = await super().getitem(key)
        if type(node) is AsyncGroup:
            return _LazyGroup(metadata=node.metadata, store_path=node.store_path)
        if isinstance(node, AsyncArray):
            object.__setattr__(node, "codec_pipeline", DirectPipeline.over(node.codec_pipeline))
        return node

    async def keys(self) -> AsyncGenerator[str, None]:
        for child in self._tree().children(self.path):
            yield child

    async def array_keys(self) -> AsyncGenerator[str, None]:
        tree = self._tree()
        for child in tree.children(self.path):
            if (f"{self.path}/{child}" if self.path else child) in tree.arrays:
                yield child

    async def group_keys(self) -> AsyncGenerator[str, None]:
        tree = self._tree()
        for child in tree.children(self.path):
            if (f"{self.path}/{child}" if self.path else child) in tree.groups:
                yield child

    async def nmembers(self, max_depth: int | None = 0) -> int:
        if max_depth == 0:
            return sum(1 for _ in self._tree().children(self.path))
        return await super().nmembers(max_depth)

    async def contains(self, member: str) -> bool:
        tree = self._tree()
        path = f"{self.path}/{member}" if self.path else member
        return path in tree.arrays or path in tree.groups


def _unit(item_bytes: int) -> np.dtype[Any]:
    return np.dtype("V16") if item_bytes == 16 else np.dtype(f"u{item_bytes}")


def _cut(data: npt.NDArray[np.uint8], byte_range: ByteRequest | None) -> npt.NDArray[np.uint8]:
    if byte_range is None:
        return data
    if isinstance(byte_range, RangeByteRequest):
        return data[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return data[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return data[max(0, data.size - byte_range.suffix) :]
    raise UnusableRequest(f"unknown byte request {byte_range!r}")
