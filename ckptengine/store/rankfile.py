"""The rank file: header, extents, granule table, tail (index, values, footer).  Bytes only; no file is opened here.

Normative text: ``docs/format/v1.md``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine import native
from ckptengine.errors import DigestMismatch, ForeignFile, Truncated, UnreadableFormat
from ckptengine.layout.digest import GRANULE_BYTES, combine_each, combine_granules, raw_to_standard, standard_each
from ckptengine.store.envelope import canonical

HEADER_BYTES = 4096
BLOCK_BYTES = 4096
"""Alignment of the end of the body, so that it can be written in whole blocks."""
DIRECT_ALIGN_BYTES = 4096
DIRECT_MIN_BYTES = 1 << 20
"""Extents from this size on sit congruent to their memory address, so that they can be written without a copy."""
PACK_ALIGN_BYTES = 64

_HEADER_MAGIC = b"CKPTRNK1"
_FOOTER_MAGIC = b"CKPTEND1"
_HEADER = struct.Struct("<8sIIQ")
_FOOTER = struct.Struct("<8sIIQQQQQ")
FOOTER_BYTES = _FOOTER.size
INDEX_DTYPE = np.dtype([("tensor", "<u4"), ("piece", "<u4"), ("offset", "<u8"), ("nbytes", "<u8"), ("crc", "<u8")])
"""One index record: tensor ordinal in the manifest, piece ordinal, byte range in this file, standard CRC-64/NVME."""

Index = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """What binds a rank file to one save: a file with another identity is never read as this one."""

    run: str
    attempt: int
    save: int
    step: int
    rank: int
    world: int

    def to_json(self) -> dict[str, object]:
        return {
            "run": self.run,
            "attempt": self.attempt,
            "save": self.save,
            "step": self.step,
            "rank": self.rank,
            "world": self.world,
        }


def place(sizes: Sequence[int], addresses: Sequence[int]) -> tuple[list[int], int]:
    """File offsets for extents of ``sizes`` bytes whose memory is at ``addresses``, and where the body ends.

    Extents follow one another from `HEADER_BYTES`.  Large ones sit congruent to their address modulo 4096 (0 as address
    means none); small ones are packed at multiples of 64.  The end is a multiple of `BLOCK_BYTES`.
    """
    cursor = HEADER_BYTES
    offsets: list[int] = []
    for nbytes, address in zip(sizes, addresses, strict=True):
        if nbytes >= DIRECT_MIN_BYTES and address:
            cursor += (address - cursor) % DIRECT_ALIGN_BYTES
        else:
            cursor += -cursor % PACK_ALIGN_BYTES
        offsets.append(cursor)
        cursor += nbytes
    return offsets, cursor + -cursor % BLOCK_BYTES


def encode_header(identity: FileIdentity) -> bytes:
    """The first `HEADER_BYTES` of a rank file."""
    body = canonical(identity.to_json())
    head = _HEADER.pack(_HEADER_MAGIC, 1, len(body), native.crc64(body)) + body
    if len(head) > HEADER_BYTES:
        raise ValueError(f"run id too long for a rank file's header: {identity.run!r}")
    return head.ljust(HEADER_BYTES, b"\0")


def check_header(data: bytes, expected: FileIdentity, where: str) -> None:
    """Compare a header with the one that this file must have; `Truncated`, `DigestMismatch` or `ForeignFile`."""
    if len(data) < HEADER_BYTES:
        raise Truncated(f"{where}: ends inside its header")
    if data[:HEADER_BYTES] == encode_header(expected):
        return
    magic, _, length, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size : _HEADER.size + length] if length <= HEADER_BYTES - _HEADER.size else b""
    if magic != _HEADER_MAGIC or native.crc64(body) != crc or any(data[_HEADER.size + length : HEADER_BYTES]):
        raise DigestMismatch(f"{where}: the header is damaged")
    raise ForeignFile(f"{where}: written as {body.decode('ascii', 'replace')}, expected {expected.to_json()}")


def granule_counts(nbytes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Granules per extent."""
    return ((nbytes.astype(np.int64) + (GRANULE_BYTES - 1)) // GRANULE_BYTES).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows the granule table: the index in (tensor, piece) order and the rank's own values.

    ``table`` is the file offset of the granule table, which is also where the body ends.
    """

    table: int
    index: Index
    values: Any
    starts: npt.NDArray[np.int64]
    """For each extent the ordinal of its first granule in the table, and one more for the end."""


def encode_tail(table: int, index: Index, granules: npt.NDArray[np.uint64], values: object) -> tuple[bytes, bytes]:
    """The granule table and the tail of a rank file whose body ends at ``table``.

    Granules are raw CRCs in index order.
    """
    encoded_table = granules.astype("<u8").tobytes()
    records = np.ascontiguousarray(index, INDEX_DTYPE).tobytes()
    encoded = canonical(values)
    start = table + len(encoded_table)
    footer = _FOOTER.pack(
        _FOOTER_MAGIC, 1, len(index), table, len(granules), start, len(encoded), native.crc64(records + encoded)
    )
    return encoded_table, records + encoded + footer


@dataclass(frozen=True, slots=True)
class Footer:
    """Where the sections of a file's end are, as file offsets and counts."""

    table: int
    granules: int
    index: int
    extents: int
    values_bytes: int
    crc: int


def decode_footer(data: bytes, file_bytes: int, where: str) -> Footer:
    """Parse the last `FOOTER_BYTES` of a rank file of ``file_bytes``; every number is checked against the size."""
    if len(data) != FOOTER_BYTES:
        raise Truncated(f"{where}: ends before its footer")
    magic, version, extents, table, granules, index, values_bytes, crc = _FOOTER.unpack(data)
    if magic != _FOOTER_MAGIC:
        raise DigestMismatch(f"{where}: no footer where it must be; the file is truncated or damaged")
    if version > 1:
        raise UnreadableFormat(f"{where}: tail version {version} is newer than this ckptengine; upgrade it")
    consistent = (
        table >= HEADER_BYTES
        and index == table + granules * 8
        and index + extents * INDEX_DTYPE.itemsize + values_bytes + FOOTER_BYTES == file_bytes
    )
    if not consistent:
        raise DigestMismatch(f"{where}: the footer does not fit the file's {file_bytes} bytes")
    return Footer(table, granules, index, extents, values_bytes, crc)


def decode_tail(data: bytes, file_bytes: int, where: str) -> Tail:
    """Parse a whole tail (index to end of file).  Raises `Damaged` for anything inconsistent."""
    footer = decode_footer(data[-FOOTER_BYTES:], file_bytes, where)
    if len(data) != file_bytes - footer.index:
        raise Truncated(f"{where}: the tail has {len(data)} bytes instead of {file_bytes - footer.index}")
    body = data[:-FOOTER_BYTES]
    if native.crc64(body) != footer.crc:
        raise DigestMismatch(f"{where}: the index does not match its digest")
    cut = footer.extents * INDEX_DTYPE.itemsize
    index = np.frombuffer(body[:cut], INDEX_DTYPE)
    try:
        values = json.loads(body[cut:])
    except (ValueError, RecursionError):
        raise UnreadableFormat(f"{where}: the rank's values are not JSON") from None
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(granule_counts(index["nbytes"]))])
    tail = Tail(footer.table, index, values, starts)
    check_index(tail, footer.granules, where)
    return tail


def check_index(tail: Tail, granules: int, where: str) -> None:
    """Extents must lie inside the body, not overlap, be sorted by (tensor, piece), and own every granule."""
    index = tail.index
    offset, nbytes = index["offset"], index["nbytes"]
    limit = np.uint64(tail.table)
    if np.any(offset > limit) or np.any(nbytes > limit - np.minimum(offset, limit)) or np.any(offset < HEADER_BYTES):
        raise DigestMismatch(f"{where}: the index names bytes outside the file")
    keys = index["tensor"].astype(np.uint64) << np.uint64(32) | index["piece"].astype(np.uint64)
    if len(keys) > 1 and np.any(keys[1:] <= keys[:-1]):
        raise DigestMismatch(f"{where}: the index is not in order")
    order = np.argsort(offset, kind="stable")
    if len(order) > 1 and np.any((offset + nbytes)[order][:-1] > offset[order][1:]):
        raise DigestMismatch(f"{where}: the index names overlapping byte ranges")
    if int(tail.starts[-1]) != granules:
        raise DigestMismatch(f"{where}: the granule table does not fit the index")


def extent_crc(granules: npt.NDArray[np.uint64], nbytes: int) -> int:
    """The standard CRC of an extent from the raw CRCs of its granules."""
    return raw_to_standard(combine_granules(granules, GRANULE_BYTES, nbytes), nbytes)


def extent_crcs(granules: npt.NDArray[np.uint64], tail: Tail) -> npt.NDArray[np.uint64]:
    """`extent_crc` of every extent of a file, uint64[extents]; ``granules`` are all of its table."""
    sizes, firsts = tail.index["nbytes"], tail.starts[:-1]
    raws = np.zeros(len(sizes), np.uint64)
    small = np.flatnonzero((sizes > 0) & (sizes <= GRANULE_BYTES))
    raws[small] = granules[firsts[small]]
    large = np.flatnonzero(sizes > GRANULE_BYTES)
    large = large[np.argsort(sizes[large], kind="stable")]
    for rows in np.split(large, np.flatnonzero(np.diff(sizes[large])) + 1) if len(large) else ():
        nbytes = int(sizes[rows[0]])
        columns = np.arange(-(-nbytes // GRANULE_BYTES))
        raws[rows] = combine_each(granules[firsts[rows, None] + columns], GRANULE_BYTES, nbytes)
    return standard_each(raws, sizes)
