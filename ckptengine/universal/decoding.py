"""Chunks that are not plain bytes, read as if they were: files whose contents zarr decodes when they are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ckptengine.errors import CheckpointError, Damaged, NotFound, Truncated
from ckptengine.layout.box import Box
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.port import Files
from ckptengine.universal import registered
from ckptengine.universal.readonly import ReadOnlyStore

CACHE_BYTES = 64 << 20
"""Decoded chunks that are kept, so that a chunk read in several parts is decoded once."""

DECODED = ":decoded/"


class FilesStore(ReadOnlyStore):
    """A read-only zarr store over `Files`."""

    def __init__(self, files: Files) -> None:
        super().__init__(f"{files.root} is open for reading only")
        self._files = files

    def _range(self, key: str, byte_range: ByteRequest | None) -> tuple[int, int]:
        size = self._files.size(key)
        start, stop = 0, size
        if isinstance(byte_range, RangeByteRequest):
            start, stop = byte_range.start, min(size, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            start = byte_range.offset
        elif isinstance(byte_range, SuffixByteRequest):
            start = max(0, size - byte_range.suffix)
        return start, max(0, stop - start)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        try:
            data = self._files.read(key, *self._range(key, byte_range))
        except NotFound:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return self._files.exists(key)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in self._files.entries(prefix.rstrip("/")):
            yield name.rstrip("/")

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        pending = [prefix.rpartition("/")[0]]
        while pending:
            folder = pending.pop()
            for name in self._files.entries(folder):
                path = f"{folder}/{name}" if folder else name
                if name.endswith("/"):
                    pending.append(path[:-1])
                elif path.startswith(prefix):
                    yield path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilesStore) and other._files is self._files


class DecodingFiles:
    """Other files, plus one for every encoded chunk of a tensor: its decoded, row-major bytes."""

    def __init__(self, base: Files) -> None:
        self._base = InlineFiles(base)
        self._lock = threading.Lock()
        self._arrays: dict[str, Any] = {}
        self._chunks: dict[str, tuple[str, Box, int]] = {}
        self._decoded: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()

    def add(self, array_path: str, box: Box, item_bytes: int) -> str:
        """The path of the decoded bytes of a box of an array; the box should be one chunk."""
        path = f"{DECODED}{array_path}{box}"
        with self._lock:
            self._chunks[path] = (array_path, box, item_bytes)
        return path

    def inline(self, data: bytes) -> str:
        """The path of a few bytes that are in no file."""
        return self._base.add(data)

    @property
    def root(self) -> str:
        return self._base.root

    def size(self, path: str) -> int:
        chunk = self._chunks.get(path)
        return self._base.size(path) if chunk is None else chunk[1].size * chunk[2]

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        if path not in self._chunks:
            return self._base.read(path, offset, nbytes)
        out = bytearray(nbytes)
        self.read_into(path, offset, memoryview(out))
        return bytes(out)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        if path not in self._chunks:
            self._base.read_into(path, offset, view)
            return
        view = view.cast("B")
        data = self._decode(path)
        if offset < 0 or offset + len(view) > data.size:
            raise Truncated(f"{self.root}/{path} has {data.size} bytes where {offset + len(view)} are wanted")
        view[:] = data[offset : offset + len(view)].data

    def _decode(self, path: str) -> npt.NDArray[np.uint8]:
        with self._lock:
            if path in self._decoded:
                self._decoded.move_to_end(path)
                return self._decoded[path]
        array_path, box, item_bytes = self._chunks[path]
        index = tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))
        try:
            values = np.asarray(self._array(array_path)[index])
        except CheckpointError:
            raise
        except Exception as error:  # codecs raise whatever they like for damaged bytes
            raise Damaged(
                f"{self.root}/{array_path}: chunk {box} cannot be decoded: {type(error).__name__}: {error}; "
                "take another copy"
            ) from error
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if data.size != box.size * item_bytes:
            raise Damaged(f"{self.root}/{array_path}: chunk {box} decodes to {data.size} bytes; take another copy")
        with self._lock:
            self._decoded[path] = data
            while len(self._decoded) > 1 and sum(kept.size for kept in self._decoded.values()) > CACHE_BYTES:
                self._decoded.popitem(last=False)
        return data

    def _array(self, path: str) -> Any:
        with self._lock:
            if path not in self._arrays:
                registered.register()
                self._arrays[path] = zarr.open_array(FilesStore(self._base), path=path, mode="r")
            return self._arrays[path]

    def exists(self, path: str) -> bool:
        return path in self._chunks or self._base.exists(path)

    def entries(self, folder: str = "") -> list[str]:
        return self._base.entries(folder)

    def sub(self, folder: str) -> Files:
        return self._base.sub(folder)

    def local_path(self, path: str) -> str | None:
        return None if path in self._chunks else self._base.local_path(path)

    def close(self) -> None:
        with self._lock:
            self._decoded.clear()
        self._base.close()
