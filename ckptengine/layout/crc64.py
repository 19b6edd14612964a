"""Portable CRC-64/NVME over bytes: numpy on long buffers, a plain loop on tiny ones.  Raw form (init 0, no xor-out)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.digest import GRANULE_BYTES, Words, combine_granules, fold, shift, shift_all, times_table
from ckptengine.layout.runs import runs_of

Readable = bytes | bytearray | memoryview | NDArray[Any]
"""Anything whose bytes lie in one C-contiguous block."""

_TINY_BYTES = 1024
_BLOCK_BYTES = 1 << 18  # what one pass touches stays in the second-level cache
_STEP: list[int] = [int(value) for value in times_table(1)[0]]  # the classic table: one octet shifted out


def octets_of(buffer: Readable) -> NDArray[np.uint8]:
    """uint8[n] over the same memory; `LayoutError` for a buffer that is not C-contiguous."""
    if isinstance(buffer, np.ndarray):
        if not buffer.flags.c_contiguous:
            raise LayoutError(f"cannot digest an array of shape {buffer.shape} that is not C-contiguous; copy it first")
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, np.uint8)


def raw_crc64(buffer: Readable) -> int:
    """The raw CRC of all bytes of ``buffer``."""
    octets = octets_of(buffer)
    if octets.size <= _TINY_BYTES:
        raw = 0
        for octet in octets.tobytes():
            raw = _STEP[(raw ^ octet) & 0xFF] ^ (raw >> 8)
        return raw
    return combine_granules(raw_granules(octets, GRANULE_BYTES), GRANULE_BYTES, octets.size)


def raw_granules(buffer: Readable, granule_bytes: int = GRANULE_BYTES) -> Words:
    """uint64[ceil(n / granule_bytes)]: the raw CRC of every granule; the last one may be shorter."""
    if granule_bytes <= 0:
        raise ValueError(f"granules of {granule_bytes} bytes")
    octets = octets_of(buffer)
    whole = octets.size // granule_bytes
    raws = np.empty(-(-octets.size // granule_bytes), np.uint64)
    _raw_rows(octets[: whole * granule_bytes].reshape(whole, granule_bytes), raws[:whole])
    if whole < raws.size:
        _raw_rows(octets[None, whole * granule_bytes :], raws[whole:])
    return raws


def raw_positioned(buffer: Readable, box: Box, shape: Sequence[int], item_bytes: int) -> int:
    """What a box contributes to the raw CRC of its whole tensor.

    ``buffer`` holds the elements of ``box``, row-major, ``item_bytes`` each; ``shape`` is the tensor's.  The xor of
    the contributions of boxes that cover the tensor exactly is the raw CRC of the tensor's row-major bytes.
    """
    octets = octets_of(buffer)
    runs = runs_of(box, shape)
    if octets.size != runs.size * item_bytes:
        raise LayoutError(f"{octets.size} bytes given for box {box} of {runs.size * item_bytes} bytes")
    if not runs.size:
        return 0
    if runs.count == 1:
        raw = raw_crc64(octets)
    else:
        raws = np.empty(runs.count, np.uint64)
        _raw_rows(octets.reshape(runs.count, runs.length * item_bytes), raws)
        raw = fold_loops(raws, runs.loops, item_bytes)
    total = item_bytes
    for extent in shape:
        total *= extent
    return shift(raw, total - runs.stop * item_bytes)


def fold_loops(raws: Words, loops: Sequence[tuple[int, int]], item_bytes: int) -> int:
    """Raw CRCs of the runs of nested (count, stride in elements) loops combined, up to the end of the last run."""
    values = raws.reshape([count for count, _ in loops])
    for _, stride in reversed(loops):
        values = fold(values, stride * item_bytes)
    return int(values)


def _raw_rows(rows: NDArray[np.uint8], raws: Words) -> None:
    """Fill ``raws[i]`` with the raw CRC of ``rows[i]``, in blocks that fit the cache."""
    count, length = rows.shape
    if not count or not length:
        raws[...] = 0
        return
    block = max(1, _BLOCK_BYTES // length)
    for first in range(0, count, block):
        part = rows[first : first + block]
        raws[first : first + block] = shift_all(fold(_words(part), 8), 8)


def _words(rows: NDArray[np.uint8]) -> Words:
    """uint64[rows, words]: every row padded in front to whole words; leading zeros leave a raw CRC as it is."""
    count, length = rows.shape
    padding = -length % 8
    if padding:
        padded = np.zeros((count, padding + length), np.uint8)
        padded[:, padding:] = rows
        rows = padded
    return np.ascontiguousarray(rows).view("<u8")
