"""Chunks of a stored zarr array as fragments, found when they are asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from ckptengine.errors import Damaged, NotFound, UnreadableFormat
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.port import Files
from ckptengine.universal.chunks import MISSING, crc32c
from ckptengine.universal.decoding import DecodingFiles
from ckptengine.universal.grid import chunk_box, chunk_counts

MAX_CHUNK_BYTES = 4 << 30
"""A chunk that must be decoded may not be larger."""

MAX_CHUNKS = 1 << 24
"""An array of more chunks than this is refused rather than listed."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """What an array's metadata says about where its elements are.

    ``outer`` is what one key holds; ``inner`` what is encoded together (the same without shards).  ``plain`` says that
    inner chunks are little-endian bytes and nothing else.
    """

    path: str
    shape: tuple[int, ...]
    data_type: object
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    sharded: bool
    index_at_end: bool
    plain: bool
    separator: str
    prefix: str
    zero_fill: bool

    @classmethod
    def parse(cls, path: str, node: Mapping[str, Any], where: str) -> StoredArray:
        """From an array's ``zarr.json``; `UnreadableFormat` for what is malformed or not a regular grid."""
        try:
            shape = _numbers(node["shape"], 0)
            grid = node["chunk_grid"]
            outer = _numbers(grid["configuration"]["chunk_shape"], 1)
            separator, prefix = _key_encoding(node.get("chunk_key_encoding", {"name": "default"}))
            codecs = node["codecs"]
            sharding = codecs[0] if len(codecs) == 1 and codecs[0]["name"] == "sharding_indexed" else None
            inner, plain, at_end = outer, _is_plain(codecs), True
            if sharding is not None:
                inner = _numbers(sharding["configuration"]["chunk_shape"], 1)
                at_end = sharding["configuration"].get("index_location", "end") == "end"
                index = sharding["configuration"].get("index_codecs")
                known = isinstance(index, list) and [codec.get("name") for codec in index] == ["bytes", "crc32c"]
                plain = known and _is_plain(index[:1]) and _is_plain(sharding["configuration"]["codecs"])
            if grid["name"] != "regular" or not len(shape) == len(outer) == len(inner):
                raise UnreadableFormat(f"{where}: only regular chunk grids can be read")
            if any(o % i for o, i in zip(outer, inner, strict=True)):
                raise UnreadableFormat(f"{where}: the chunks of a shard do not fill it")
            return cls(
                path,
                shape,
                node["data_type"],
                outer,
                inner,
                sharding is not None,
                at_end,
                plain,
                separator,
                prefix,
                zero_fill=node.get("fill_value", 0) in (0, [0, 0], "0x00", "0x0000"),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UnreadableFormat(f"{where}/zarr.json is malformed ({error!r}); take another copy") from None

    def key(self, index: Sequence[int]) -> str:
        """The file of an outer chunk."""
        parts = [*([self.prefix] if self.prefix else []), *map(str, index)]
        leaf = self.separator.join(parts) if parts else "0"
        return f"{self.path}/{leaf}" if self.path else leaf


def _numbers(value: object, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and least <= n < 1 << 60 for n in value):
        raise ValueError(f"not a list of sizes: {value!r:.80}")
    return tuple(value)


def _key_encoding(encoding: Mapping[str, Any]) -> tuple[str, str]:
    name = encoding["name"]
    if name not in ("default", "v2"):
        raise ValueError(f"chunk key encoding {name!r}")
    separator = encoding.get("configuration", {}).get("separator", "/" if name == "default" else ".")
    if separator not in ("/", "."):
        raise ValueError(f"chunk key separator {separator!r}")
    return separator, "c" if name == "default" else ""


def _is_plain(codecs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether codecs only say little-endian bytes, in order."""
    if len(codecs) != 1:
        return False
    codec = codecs[0]
    return codec.get("name") == "bytes" and codec.get("configuration", {}).get("endian", "little") == "little"


class StoredChunks(Sequence[Fragment]):
    """The inner chunks of an array as fragments.

    ``fills`` says that a file that does not exist means zeros, as zarr has it; hierarchies of ours always write every
    chunk, so that there a missing file is an error when it is read.
    """

    def __init__(self, files: Files, array: StoredArray, item_bytes: int, where: str, *, fills: bool) -> None:
        self._files, self._array, self._item_bytes, self._where, self._fills = files, array, item_bytes, where, fills
        self._indexes: dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.uint64]]] = {}
        if math.prod(chunk_counts(array.inner, array.shape)) > MAX_CHUNKS:
            raise UnreadableFormat(f"{where}: an array of more than {MAX_CHUNKS} chunks; rewrite it with larger ones")
        if not array.plain and math.prod(array.inner) * item_bytes > MAX_CHUNK_BYTES:
            raise UnreadableFormat(f"{where}: encoded chunks of more than {MAX_CHUNK_BYTES} bytes; rewrite it")

    def overlapping(self, box: Box) -> Iterator[Fragment]:
        """The chunks that share an element with ``box``."""
        if box.size == 0 or math.prod(self._array.shape) == 0:
            return
        ranges = [range(o // c, -(-e // c)) for o, e, c in zip(box.offsets, box.ends, self._array.inner, strict=True)]
        for index in itertools.product(*ranges):
            yield self._fragment(index)

    @cached_property
    def _all(self) -> tuple[Fragment, ...]:
        return tuple(self.overlapping(Box.whole(self._array.shape)))

    def __len__(self) -> int:
        return math.prod(chunk_counts(self._array.inner, self._array.shape))

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Fragment]: ...
    def __getitem__(self, index: int | slice) -> Fragment | Sequence[Fragment]:
        return self._all[index]

    def _fragment(self, index: tuple[int, ...]) -> Fragment:
        array = self._array
        box = chunk_box(index, array.inner, array.shape)
        per_outer = tuple(o // i for o, i in zip(array.outer, array.inner, strict=True))
        outer = tuple(i // n for i, n in zip(index, per_outer, strict=True))
        key = array.key(outer)
        if self._fills and not self._files.exists(key):
            return self._zeros(box)
        if not array.plain:
            self._must_exist(outer, key, tuple(i % n for i, n in zip(index, per_outer, strict=True)))
            assert isinstance(self._files, DecodingFiles)
            return Fragment(box, self._files.add(array.path, box, self._item_bytes), 0)
        # A chunk at the edge is stored whole: its rows are longer than the box's.
        strides = None if box.shape == array.inner else row_major_strides(array.inner)
        if not array.sharded:
            return Fragment(box, key, 0, strides)
        offset, nbytes = self._index(outer, key)[tuple(i % n for i, n in zip(index, per_outer, strict=True))].tolist()
        if offset == nbytes == MISSING and self._fills:
            return self._zeros(box)
        if nbytes != math.prod(array.inner) * self._item_bytes or offset + nbytes > self._files.size(key):
            raise Damaged(f"{self._files.root}/{key}: its index puts chunk {index} at {nbytes} bytes from {offset}")
        return Fragment(box, key, offset, strides)

    def _must_exist(self, outer: tuple[int, ...], key: str, inner: tuple[int, ...]) -> None:
        """zarr decodes what is missing as zeros; in a hierarchy of ours nothing is."""
        if self._fills:
            return
        if not self._files.exists(key):
            raise NotFound(f"{self._files.root}/{key} is missing; copy the hierarchy again")
        if self._array.sharded and int(self._index(outer, key)[inner][0]) == MISSING:
            raise Damaged(f"{self._files.root}/{key}: its index lacks chunk {inner}; copy the hierarchy again")

    def _zeros(self, box: Box) -> Fragment:
        if not self._array.zero_fill:
            raise UnreadableFormat(f"{self._where}: chunk {box} is missing and stands for a fill value other than zero")
        assert isinstance(self._files, DecodingFiles)
        return Fragment(box, self._files.inline(bytes(self._item_bytes)), 0, (0,) * box.ndim)

    def _index(self, outer: tuple[int, ...], key: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
        if outer not in self._indexes:
            counts = chunk_counts(self._array.inner, self._array.outer)
            nbytes = 16 * math.prod(counts) + 4
            try:
                size = self._files.size(key)
            except NotFound:
                raise NotFound(f"{self._files.root}/{key} is missing; copy the hierarchy again") from None
            if size < nbytes:
                raise Damaged(f"{self._files.root}/{key}: {size} bytes are too few for the index of a shard")
            data = self._files.read(key, size - nbytes if self._array.index_at_end else 0, nbytes)
            if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
                raise Damaged(f"{self._files.root}/{key}: the index of the shard does not match its checksum")
            self._indexes[outer] = np.frombuffer(data[:-4], "<u8").reshape(*counts, 2)
        return self._indexes[outer]
