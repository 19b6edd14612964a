"""The digest of a whole rank file from what was recorded when it was written, without reading its body.

The index holds the CRC of every extent, everything between extents is zero, and CRCs are linear: so the header, the
tail and the index together say what the CRC of all bytes must be.  A drain compares it with what it reads, and damage
that happened at rest is found before it is carried anywhere.
"""

from __future__ import annotations

import asyncio

import numpy as np

from ckptengine import native
from ckptengine.errors import DigestMismatch
from ckptengine.layout.digest import GRANULE_BYTES, Words, format_digest, raw_to_standard, shift, shift_each
from ckptengine.store.manifest import FileRecord
from ckptengine.store.rankfile import FOOTER_BYTES, HEADER_BYTES, Tail, decode_footer, decode_tail
from ckptengine.tiers.port import TierPort

_ONES = 0xFFFF_FFFF_FFFF_FFFF


async def rank_file_digest(tier: TierPort, name: str, record: FileRecord) -> str:
    """``"crc64nvme:..."`` of the bytes that the rank file ``name`` must have, by its index and the manifest.

    Raises `Damaged` where the file is shorter than recorded, its tail is not the recorded one, or its granule table
    does not fit its index.
    """
    where = f"{tier.label}/{name}"
    size_bytes = record.nbytes
    header = await tier.read(name, 0, HEADER_BYTES)
    footer = decode_footer(await tier.read(name, size_bytes - FOOTER_BYTES, FOOTER_BYTES), size_bytes, where)
    table = await tier.read(name, footer.table, footer.index - footer.table)
    tail_bytes = await tier.read(name, footer.index, size_bytes - footer.index)
    return await asyncio.to_thread(_whole, header, table, tail_bytes, record, where)


def _whole(header: bytes, table: bytes, tail_bytes: bytes, record: FileRecord, where: str) -> str:
    size_bytes = record.nbytes
    if native.crc64(tail_bytes) != record.tail_crc:
        raise DigestMismatch(f"{where}: the index is not the one that was committed; take another copy")
    tail = decode_tail(tail_bytes, size_bytes, where)
    raws = _raw_of_each(tail)
    if not np.array_equal(raws, _raw_by_granules(tail, np.frombuffer(table, "<u8").astype(np.uint64))):
        raise DigestMismatch(f"{where}: the granule table does not fit the index; take another copy")
    index = tail.index
    behind = np.uint64(size_bytes) - index["offset"].astype(np.uint64) - index["nbytes"].astype(np.uint64)
    raw = shift(native.raw_crc64(header), size_bytes - HEADER_BYTES)
    raw ^= int(np.bitwise_xor.reduce(shift_each(raws, behind), initial=np.uint64(0)))
    raw ^= shift(native.raw_crc64(table), len(tail_bytes)) ^ native.raw_crc64(tail_bytes)
    return format_digest(raw_to_standard(raw, size_bytes))


def _raw_of_each(tail: Tail) -> Words:
    """uint64[extents]: the raw CRC of every extent; the index has the standard ones."""
    ones = np.full(len(tail.index), _ONES, np.uint64)
    return tail.index["crc"].astype(np.uint64) ^ shift_each(ones, tail.index["nbytes"].astype(np.uint64)) ^ ones


def _raw_by_granules(tail: Tail, granules: Words) -> Words:
    """The same from the granules."""
    counts = np.diff(tail.starts)
    result = np.zeros(len(counts), np.uint64)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return result
    ordinal = np.arange(len(granules)) - np.repeat(tail.starts[:-1], counts)
    lengths = np.repeat(tail.index["nbytes"].astype(np.int64), counts)
    behind = np.maximum(lengths - (ordinal + 1) * GRANULE_BYTES, 0)
    result[filled] = np.bitwise_xor.reduceat(shift_each(granules, behind), tail.starts[:-1][filled])
    return result
