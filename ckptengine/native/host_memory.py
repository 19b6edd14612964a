"""Digests and strided copies of memory."""

from __future__ import annotations

import ctypes
import itertools
import random
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ckptengine.layout import crc64 as portable
from ckptengine.layout import digest as algebra
from ckptengine.layout.box import Box
from ckptengine.layout.digest import GRANULE_BYTES, Words
from ckptengine.layout.runs import runs_of
from ckptengine.native.library import library

_LINES = 4
_LINE_BYTES = 64
"""What the portable path looks at of a large memory."""


def raw_crc64(buffer: portable.Readable) -> int:
    """The raw CRC of all bytes of ``buffer``; `LayoutError` for an array that is not C-contiguous."""
    octets = portable.octets_of(buffer)
    if library is None:
        return portable.raw_crc64(octets)
    return int(library.crc_digest(octets.ctypes.data, octets.size))


def crc64(buffer: portable.Readable) -> int:
    """The standard CRC of all bytes of ``buffer``, the form that is written."""
    octets = portable.octets_of(buffer)
    return algebra.raw_to_standard(raw_crc64(octets), octets.size)


def digest(buffer: portable.Readable) -> str:
    """``"crc64nvme:<16 hex digits>"`` of all bytes of ``buffer``."""
    return algebra.format_digest(crc64(buffer))


def raw_granules(buffer: portable.Readable, granule_bytes: int = GRANULE_BYTES) -> Words:
    """uint64[ceil(n / granule_bytes)]: the raw CRC of every granule; the last one may be shorter."""
    octets = portable.octets_of(buffer)
    if library is None:
        return portable.raw_granules(octets, granule_bytes)
    values: Words = library.crc_granules(octets.ctypes.data, octets.size, granule_bytes)
    return values


def witnesses(addresses: Words, sizes: Words, *, whole_bytes: int, lines: int, seed: int) -> Words:
    """uint64[n]: a word for each memory of ``sizes[i]`` bytes from ``addresses[i]`` on, the same until it is written.

    Of all of it up to ``whole_bytes``; beyond that of ``lines`` cache lines (1 to 16; at most 4 without the library)
    spread over it, others for every ``seed``.
    """
    if library is not None:
        values: Words = library.witnesses(addresses, sizes, whole_bytes, lines, seed)
        return values
    lines = min(lines, _LINES)
    words = []
    for address, size in zip(addresses.tolist(), sizes.tolist(), strict=True):
        if size <= max(whole_bytes, 16):
            words.append(zlib.crc32(ctypes.string_at(address, size)))
            continue
        dice = random.Random(seed ^ address)
        cuts = [size * n // lines for n in range(lines + 1)]
        # Lines as the library takes them, so that the first byte is seen as often as others.
        starts = [
            low + dice.randrange(high - low) // _LINE_BYTES * _LINE_BYTES for low, high in itertools.pairwise(cuts)
        ]
        seen = [ctypes.string_at(address + start, min(_LINE_BYTES, size - start)) for start in starts]
        words.append(zlib.crc32(b"".join(seen)))
    return np.array(words, np.uint64)


def raw_positioned(buffer: portable.Readable, box: Box, shape: Sequence[int], item_bytes: int) -> int:
    """What a box contributes to the raw CRC of its whole tensor, as `ckptengine.layout.crc64.raw_positioned`."""
    octets = portable.octets_of(buffer)
    runs = runs_of(box, shape)
    if library is None or octets.size != runs.size * item_bytes or not octets.size:
        return portable.raw_positioned(octets, box, shape, item_bytes)
    loops = np.array(runs.loops, np.int64).reshape(-1, 2) * (1, item_bytes)
    follow_bytes = int(np.prod(shape, dtype=object)) * item_bytes - runs.stop * item_bytes
    run_bytes = runs.length * item_bytes
    return int(library.crc_positioned(octets.ctypes.data, 0, octets.size, run_bytes, loops, follow_bytes))


def copy_raw_crc64(target: NDArray[np.uint8], source: portable.Readable) -> int:
    """Copy ``source`` to ``target`` (contiguous, of the same length) and return the raw CRC of what was stored."""
    octets = portable.octets_of(source)
    if target.shape != octets.shape or not target.flags.c_contiguous:
        raise ValueError(f"cannot copy {octets.shape} bytes to an array of shape {target.shape}")
    if library is None:
        target[...] = octets
        return portable.raw_crc64(target)
    return int(library.crc_copy_digest(target.ctypes.data, octets.ctypes.data, octets.size))


def shift(raw: int, nbytes: int) -> int:
    """The raw CRC of the same bytes followed by ``nbytes`` zeros."""
    return algebra.shift(raw, nbytes) if library is None else int(library.crc_shift(raw, nbytes))


def memory(address: int, size_bytes: int) -> NDArray[np.uint8]:
    """uint8[size_bytes] over existing memory, which must outlive the array."""
    if size_bytes == 0:
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


def gather(target: NDArray[np.uint8], address: int, item_bytes: int, loops: NDArray[np.int64], begin: int = 0) -> None:
    """Fill ``target`` with row-major bytes ``begin ...`` of the strided region whose first item is at ``address``."""
    if library is None:
        region = _region(address, item_bytes, loops).reshape(-1)
        target[...] = region[begin : begin + target.size]
    else:
        library.gather(target.ctypes.data, address, item_bytes, loops, begin, begin + target.size)


def scatter(address: int, source: NDArray[np.uint8], item_bytes: int, loops: NDArray[np.int64], begin: int = 0) -> None:
    """Write ``source`` to row-major bytes ``begin ...`` of a strided region without zero strides."""
    if library is None:
        region = _region(address, item_bytes, loops)
        region.flat[begin : begin + source.size] = source
    else:
        library.scatter(address, source.ctypes.data, item_bytes, loops, begin, begin + source.size)


def _region(address: int, item_bytes: int, loops: NDArray[np.int64]) -> NDArray[np.uint8]:
    counts, strides = loops[:, 0].tolist(), loops[:, 1].tolist()
    if 0 in counts:
        return np.zeros((*counts, item_bytes), np.uint8)
    low = sum((n - 1) * s for n, s in zip(counts, strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(counts, strides, strict=True) if s > 0) + item_bytes
    span = memory(address + low, high - low)
    return np.lib.stride_tricks.as_strided(span[-low:], (*counts, item_bytes), (*strides, 1))
