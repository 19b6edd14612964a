"""The algebra of CRC-64/NVME: how digests of parts become the digest of the whole.

A *raw* CRC (init 0, no final xor) is a linear map from bytes to polynomials over GF(2) modulo P::

    raw(A || B) = raw(A) * x^(8 * len(B))  xor  raw(B)

so contributions of parts can be computed anywhere, in any order and xored together.  The *standard* form (init and
final xor all ones, the one that is written) differs from the raw one by a constant of the length alone.

Polynomials are 64-bit integers in reflected order: bit 63 is the coefficient of x^0.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import UnreadableFormat

ALGORITHM = "crc64nvme"
GRANULE_BYTES = 16384
"""Bytes of an extent that are digested together; a partial read verifies whole granules."""

POLYNOMIAL = 0x9A6C9329AC4BC9B5  # 0xAD93D23594C93659 with its bits reversed
_ONES = 0xFFFF_FFFF_FFFF_FFFF
_ONE = 1 << 63  # x^0
_PATTERN = re.compile(rf"{ALGORITHM}:[0-9a-f]{{16}}")

Words = NDArray[np.uint64]


def multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo P."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & _ONES
        b = (b >> 1) ^ (POLYNOMIAL if b & 1 else 0)
    return product


def _squares() -> tuple[int, ...]:
    """x^(8 * 2^j) for every bit j of a length in bytes."""
    value = _ONE >> 8
    powers = []
    for _ in range(64):
        powers.append(value)
        value = multiply(value, value)
    return tuple(powers)


_POWERS = _squares()


@lru_cache(maxsize=16384)
def power(nbytes: int) -> int:
    """x^(8 * nbytes) modulo P, for ``0 <= nbytes < 2**64``."""
    if not 0 <= nbytes < 1 << 64:
        raise ValueError(f"length out of range: {nbytes} bytes")
    value = _ONE
    for j in range(nbytes.bit_length()):
        if nbytes >> j & 1:
            value = multiply(value, _POWERS[j])
    return value


def shift(raw: int, nbytes: int) -> int:
    """The raw CRC of the same bytes followed by ``nbytes`` zeros: ``raw * x^(8 * nbytes)``."""
    return multiply(raw, power(nbytes)) if raw else 0


def combine(raw_a: int, raw_b: int, len_b: int) -> int:
    """The raw CRC of A || B from those of A and B; ``len_b`` is B's length in bytes."""
    return shift(raw_a, len_b) ^ raw_b


@lru_cache(maxsize=16384)
def _standard_constant(nbytes: int) -> int:
    return shift(_ONES, nbytes) ^ _ONES


def raw_to_standard(raw: int, nbytes: int) -> int:
    """The standard CRC of a message of ``nbytes`` from its raw one."""
    return raw ^ _standard_constant(nbytes)


def standard_to_raw(standard: int, nbytes: int) -> int:
    """The raw CRC of a message of ``nbytes`` from its standard one."""
    return raw_to_standard(standard, nbytes)  # the same constant is xored in both directions


@lru_cache(maxsize=512)
def times_table(nbytes: int) -> Words:
    """uint64[8, 256]: ``table[k, b]`` is ``(b << 8 * k) * x^(8 * nbytes)``; a product is the xor of 8 look-ups."""
    column = power(nbytes)
    columns = np.zeros(64, np.uint64)
    for bit in range(63, -1, -1):
        columns[bit] = column
        column = (column >> 1) ^ (POLYNOMIAL if column & 1 else 0)
    table = np.zeros((8, 256), np.uint64)
    for bit in range(8):
        table[:, 1 << bit : 2 << bit] = table[:, : 1 << bit] ^ columns[bit::8, None]
    table.flags.writeable = False
    return table


def shift_all(values: Words, nbytes: int) -> Words:
    """Every value times x^(8 * nbytes); any shape."""
    if nbytes == 0:
        return values
    table = times_table(nbytes)
    values = np.ascontiguousarray(values, "<u8")
    octets = values.view(np.uint8).reshape(*values.shape, 8)
    product = np.take(table[0], octets[..., 0])
    scratch = np.empty_like(product)
    for k in range(1, 8):
        # "wrap" skips the bounds check's buffering; an octet cannot exceed 255.
        np.take(table[k], octets[..., k], out=scratch, mode="wrap")
        product ^= scratch
    return product


def shift_each(values: Words, nbytes: NDArray[np.int64] | NDArray[np.uint64]) -> Words:
    """``values[i] * x^(8 * nbytes[i])`` for one-dimensional arrays of equal length."""
    result = np.array(values, np.uint64)
    distances = np.asarray(nbytes).astype(np.uint64)
    if not result.size:
        return result
    for j in range(int(distances.max()).bit_length()):
        chosen = np.flatnonzero(distances >> np.uint64(j) & np.uint64(1))
        if chosen.size:
            result[chosen] = shift_all(result[chosen], 1 << j)
    return result


def fold(values: Words, step_bytes: int) -> Words:
    """The last axis combined: ``xor over i of values[..., i] * x^(8 * step_bytes * (n - 1 - i))``.

    With raw CRCs of consecutive blocks of ``step_bytes`` this is the raw CRC of all of them together.  Halves are
    combined pairwise, so the cost is that of one product per value.
    """
    n = values.shape[-1]
    if n == 0:
        return np.zeros(values.shape[:-1], np.uint64)
    while n > 1:
        high = n // 2
        low = n - high
        folded = values[..., high:].copy()
        folded[..., low - high :] ^= shift_all(values[..., :high], step_bytes * low)
        values, n = folded, low
    return values[..., 0]


def combine_granules(raws: Words, granule_bytes: int, total_bytes: int) -> int:
    """The raw CRC of ``total_bytes`` from the raw CRCs of its granules, of which only the last may be shorter."""
    raws = np.asarray(raws, np.uint64)
    expected = -(-total_bytes // granule_bytes)
    if raws.ndim != 1 or raws.size != expected:
        raise ValueError(f"{total_bytes} bytes have {expected} granules of {granule_bytes}, not {raws.shape}")
    if not expected:
        return 0
    head = int(fold(raws[:-1], granule_bytes))
    return combine(head, int(raws[-1]), total_bytes - (expected - 1) * granule_bytes)


def combine_each(raws: Words, granule_bytes: int, total_bytes: int) -> Words:
    """`combine_granules` of many extents of the same size: uint64[extents, granules] to uint64[extents]."""
    expected = -(-total_bytes // granule_bytes)
    if raws.ndim != 2 or raws.shape[1] != expected:
        raise ValueError(f"{total_bytes} bytes have {expected} granules of {granule_bytes}, not {raws.shape}")
    if not expected:
        return np.zeros(len(raws), np.uint64)
    heads = fold(raws[:, :-1], granule_bytes)
    return shift_all(heads, total_bytes - (expected - 1) * granule_bytes) ^ raws[:, -1]


def standard_each(raws: Words, nbytes: NDArray[np.int64] | NDArray[np.uint64]) -> Words:
    """`raw_to_standard` of many: the standard CRCs of byte strings of ``nbytes`` from their raw ones."""
    ones = np.full(len(raws), _ONES, np.uint64)
    return raws.astype(np.uint64) ^ shift_each(ones, nbytes) ^ ones


def format_digest(standard: int) -> str:
    """``"crc64nvme:<16 hex digits>"``, the written form of a standard CRC."""
    return f"{ALGORITHM}:{standard:016x}"


def parse_digest(text: str) -> int:
    """The standard CRC that ``text`` writes; `UnreadableFormat` for anything but ``crc64nvme:<16 hex digits>``."""
    if not isinstance(text, str) or not _PATTERN.fullmatch(text):
        raise UnreadableFormat(f"not a digest: {text!r:.80}; expected {ALGORITHM}:<16 lower-case hex digits>")
    return int(text[len(ALGORITHM) + 1 :], 16)
