"""CRC-64/NVME: the algebra and the portable implementation against a bit-by-bit definition."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import CheckpointError, LayoutError
from ckptengine.layout import crc64, digest
from ckptengine.layout.box import Box
from ckptengine.layout.flat import flat_boxes


def raw_by_definition(message: bytes) -> int:
    """Bit by bit, straight from the definition."""
    state = 0
    for octet in message:
        state ^= octet
        for _ in range(8):
            state = (state >> 1) ^ (0x9A6C9329AC4BC9B5 if state & 1 else 0)
    return state


def noise(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def test_check_value() -> None:
    raw = crc64.raw_crc64(b"123456789")
    assert digest.raw_to_standard(raw, 9) == 0xAE8B14860A799888
    assert digest.standard_to_raw(0xAE8B14860A799888, 9) == raw
    assert digest.raw_to_standard(0, 0) == 0


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 1023, 1024, 1025, 1031, 4099, 16384, 16385, 40001])
def test_raw_crc_of_any_length(nbytes: int) -> None:
    message = noise(nbytes)
    expected = raw_by_definition(message)
    for form in (message, bytearray(message), memoryview(message), np.frombuffer(message, np.uint8)):
        assert crc64.raw_crc64(form) == expected


def test_long_buffer_equals_combination_of_its_parts() -> None:
    message = noise(3_000_007)
    cut = 1_234_567
    whole = crc64.raw_crc64(message)
    parts = crc64.raw_crc64(message[:cut]), crc64.raw_crc64(message[cut:])
    assert whole == digest.combine(*parts, len(message) - cut)
    assert crc64.raw_crc64(message[:-1] + bytes([message[-1] ^ 1])) != whole


@given(a=st.binary(max_size=80), b=st.binary(max_size=80))
def test_combine(a: bytes, b: bytes) -> None:
    raw = digest.combine(raw_by_definition(a), raw_by_definition(b), len(b))
    assert raw == raw_by_definition(a + b) == crc64.raw_crc64(a + b)


@given(value=st.integers(0, 2**64 - 1), near=st.integers(0, 2**63 - 1), far=st.integers(0, 2**62 - 1))
def test_shift_adds_up(value: int, near: int, far: int) -> None:
    assert digest.shift(digest.shift(value, near), far) == digest.shift(value, near + far)
    values = np.array([value, 1], np.uint64)
    shifted = digest.shift_each(values, np.array([near, far], np.int64))
    assert shifted.tolist() == [digest.shift(value, near), digest.shift(1, far)]
    assert digest.shift_all(values, near).tolist() == [digest.shift(value, near), digest.shift(1, near)]


@given(nbytes=st.integers(0, 700), granule_bytes=st.sampled_from([1, 3, 8, 16, 100, 1024]))
def test_granules_combine_to_the_whole(nbytes: int, granule_bytes: int) -> None:
    message = noise(nbytes, seed=nbytes)
    raws = crc64.raw_granules(message, granule_bytes)
    assert raws.tolist() == [raw_by_definition(message[i : i + granule_bytes]) for i in range(0, nbytes, granule_bytes)]
    assert digest.combine_granules(raws, granule_bytes, nbytes) == raw_by_definition(message)


@given(nbytes=st.integers(0, 300), granule_bytes=st.sampled_from([1, 8, 100]), count=st.integers(0, 4))
def test_many_extents_of_one_size_combine_at_once(nbytes: int, granule_bytes: int, count: int) -> None:
    messages = [noise(nbytes, seed=seed) for seed in range(count)]
    raws = np.zeros((count, -(-nbytes // granule_bytes)), np.uint64)
    for row, message in zip(raws, messages, strict=True):
        row[:] = crc64.raw_granules(message, granule_bytes)
    found = digest.combine_each(raws, granule_bytes, nbytes)
    assert found.tolist() == [raw_by_definition(message) for message in messages]


def test_wrong_number_of_granules_is_refused() -> None:
    with pytest.raises(ValueError, match="2 granules"):
        digest.combine_granules(np.zeros(3, np.uint64), 16, 32)
    with pytest.raises(ValueError, match="2 granules"):
        digest.combine_each(np.zeros((1, 3), np.uint64), 16, 32)


@given(data=st.data())
def test_positioned_contributions_of_a_grid_of_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.float32, np.complex128]))
    tensor = np.arange(1, math.prod(shape) + 1).astype(dtype).reshape(shape)
    cuts = [sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    total = 0
    for corner in itertools.product(*[list(itertools.pairwise(c)) for c in cuts]):
        box = Box(tuple(a for a, _ in corner), tuple(b - a for a, b in corner))
        local = np.ascontiguousarray(tensor[tuple(slice(a, b) for a, b in corner)])
        total ^= crc64.raw_positioned(local, box, shape, tensor.itemsize)
    assert total == raw_by_definition(tensor.tobytes())


@given(shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), data=st.data())
def test_positioned_contributions_of_flat_cuts(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = np.arange(math.prod(shape), dtype=np.uint16) * 257 + 1
    cut = data.draw(st.integers(0, tensor.size))
    total = 0
    for start, stop in ((0, cut), (cut, tensor.size)):
        for box in flat_boxes(shape, start, stop):
            total ^= crc64.raw_positioned(tensor[start : start + box.size], box, shape, 2)
            start += box.size
    assert total == raw_by_definition(tensor.tobytes())


def test_positioned_refuses_wrong_sizes() -> None:
    with pytest.raises(LayoutError, match="8 bytes given"):
        crc64.raw_positioned(b"12345678", Box((0,), (3,)), (4,), 4)
    with pytest.raises(LayoutError, match="does not lie inside"):
        crc64.raw_positioned(b"12345678", Box((3,), (2,)), (4,), 4)
    with pytest.raises(LayoutError, match="C-contiguous"):
        crc64.raw_crc64(np.zeros((4, 4))[:, 1:])


def test_written_form() -> None:
    assert digest.format_digest(0xAB) == "crc64nvme:00000000000000ab"
    assert digest.parse_digest("crc64nvme:ae8b14860a799888") == 0xAE8B14860A799888


@pytest.mark.parametrize("text", ["", "crc64nvme:", "crc32:00000000000000ab", "crc64nvme:00000000000000AB", None, 7])
def test_malformed_written_form(text: object) -> None:
    with pytest.raises(CheckpointError, match="not a digest"):
        digest.parse_digest(text)  # type: ignore[arg-type]
