"""How a written tensor is cut and encoded: chunks, compressed as asked, grouped in shards that end with an index."""

from __future__ import annotations

import dataclasses
import gzip
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptengine.errors import UnusableRequest
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.universal.grid import chunk_counts, even_chunks
from ckptengine.universal.metadata import BYTES_CODEC, Json, chunk_key

SHARD_BYTES = 1 << 30
"""Files are at most about this large where a tensor is sharded."""

PAGE_BYTES = 4096

SEPARATOR = "."
"""Of chunks' keys.  Files lie right beside their array's metadata: folders for them would cost as much as they do."""

MISSING = (1 << 64) - 1
"""What an index holds, as offset and as length, for a chunk that lies outside of the array."""

Encode = Callable[[memoryview], bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a hierarchy is written.

    ``compression`` is None, ``"zstd"`` or ``"gzip"``, with ``:level`` behind where wanted.  ``shards`` groups the
    chunks of a tensor in few files; without it each chunk is a file.  ``registered`` declares bfloat16 and float8 as
    registered data types instead of integers.
    """

    compression: str | None = None
    shards: bool = True
    registered: bool = False
    shard_bytes: int = SHARD_BYTES
    chunk_bytes: int | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What the options are called."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Encoding:
        """From a job's options; `UnusableRequest` for values that mean nothing."""
        made = cls(**options)  # type: ignore[arg-type]
        compressor(made.compression)
        for name in ("shard_bytes", "chunk_bytes"):
            value = getattr(made, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UnusableRequest(f"option {name} must be a number of bytes, not {value!r}")
        return made


@dataclass(frozen=True, slots=True)
class Cut:
    """The chunks of one tensor: ``outer`` is what one file holds, ``inner`` what is encoded together."""

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    sharded: bool

    def files(self, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Indices of the files, row-major."""
        return np.ndindex(*chunk_counts(self.outer, shape))

    @property
    def inner_counts(self) -> tuple[int, ...]:
        return chunk_counts(self.inner, self.outer)


def cut_of(tensor: LogicalTensor, encoding: Encoding, chunk_bytes: int) -> Cut:
    """How a tensor is cut: chunks of at most ``chunk_bytes``, in shards of at most the encoding's size."""
    item_bytes = itemsize(tensor.dtype)
    inner = even_chunks(tensor.shape, item_bytes, min(chunk_bytes, encoding.chunk_bytes or chunk_bytes))
    counts = chunk_counts(inner, tensor.shape)
    if not encoding.shards or math.prod(counts) <= 1:
        return Cut(inner, inner, sharded=False)
    limit = max(1, encoding.shard_bytes // (math.prod(inner) * item_bytes))  # chunks in a shard
    together = [1] * len(counts)
    for d in range(len(counts) - 1, -1, -1):
        fit = limit // math.prod(together)
        files = -(-counts[d] // max(1, min(fit, counts[d])))
        together[d] = -(-counts[d] // files)  # shards of nearly equal size
        if together[d] < counts[d]:
            break
    return Cut(tuple(c * k for c, k in zip(inner, together, strict=True)), inner, sharded=True)


def codecs_of(cut: Cut, encoding: Encoding) -> list[Json]:
    """The ``codecs`` of an array's metadata."""
    inner = [BYTES_CODEC]
    if encoding.compression is not None:
        name, level = _parse(encoding.compression)
        configuration: Json = {"level": level}
        if name == "zstd":
            configuration["checksum"] = False
        inner.append({"name": name, "configuration": configuration})
    if not cut.sharded:
        return inner
    sharding = {
        "chunk_shape": list(cut.inner),
        "codecs": inner,
        "index_codecs": [BYTES_CODEC, {"name": "crc32c"}],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": sharding}]


def compressor(compression: str | None) -> Encode:
    """What encodes the bytes of one chunk; `UnusableRequest` for a compression that is not known."""
    if compression is None:
        return lambda data: data
    name, level = _parse(compression)
    if name == "gzip":
        return lambda data: gzip.compress(data, level, mtime=0)
    try:
        from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # comes with zarr
    except ImportError:
        raise UnusableRequest("zstd compression needs the package zarr; pip install 'ckptengine[zarr]'") from None
    codec = Zstd(level=level)
    return lambda data: bytes(codec.encode(data))


def _parse(compression: str) -> tuple[str, int]:
    name, colon, level = str(compression).partition(":")
    limits = {"zstd": (3, 22), "gzip": (5, 9)}
    if name not in limits or (colon and not (level.isascii() and level.isdigit() and int(level) <= limits[name][1])):
        raise UnusableRequest(
            f"compression {compression!r} is not known; use none, zstd, zstd:LEVEL, gzip or gzip:LEVEL"
        )
    return name, int(level) if colon else limits[name][0]


def crc32c(data: bytes) -> int:
    """The checksum of a shard's index."""
    try:
        from google_crc32c import value  # comes with zarr
    except ImportError:
        raise UnusableRequest("zarr shards need the package zarr; pip install 'ckptengine[zarr]'") from None
    return int(value(data))


def shard_index(entries: Sequence[tuple[int, int]]) -> bytes:
    """The index at the end of a shard: little-endian (offset, length) pairs and their CRC-32C."""
    data = np.array(entries, "<u8").tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def index_bytes(cut: Cut) -> int:
    """Size of a shard's index; 0 for files without one."""
    return 16 * math.prod(cut.inner_counts) + 4 if cut.sharded else 0


def file_of(path: str, index: Sequence[int]) -> str:
    """The file of one outer chunk of the array at ``path``."""
    return f"{path}/{chunk_key(index, SEPARATOR)}"


def padded_bytes(tensor: LogicalTensor, cut: Cut) -> int:
    """Uncompressed bytes of all files of a tensor, padding at edges and indexes included."""
    files = math.prod(chunk_counts(cut.outer, tensor.shape))
    chunks = math.prod(chunk_counts(cut.inner, tensor.shape))
    return chunks * math.prod(cut.inner) * itemsize(tensor.dtype) + files * index_bytes(cut)


def zeros_like_chunk(cut: Cut, item_bytes: int) -> np.ndarray[Any, Any]:
    """A chunk of zeros, in units of the element size, at an address that direct I/O takes."""
    size_bytes = math.prod(cut.inner) * item_bytes
    room = np.zeros(size_bytes + PAGE_BYTES, np.uint8)
    skip = -room.ctypes.data % PAGE_BYTES
    unit = np.dtype("V16") if item_bytes == 16 else np.dtype(f"u{item_bytes}")
    return room[skip : skip + size_bytes].view(unit).reshape(cut.inner)
