"""Digests and strided copies: the library, the portable path and a bit-by-bit definition agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptengine import native
from ckptengine.errors import LayoutError
from ckptengine.layout import digest
from ckptengine.layout.box import Box
from tests.native.conftest import NEEDS_LIBRARY, counting

SAME_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def by_bits(data: bytes) -> int:
    """The raw CRC straight from the polynomial."""
    raw = 0
    for byte in data:
        raw ^= byte
        for _ in range(8):
            raw = (raw >> 1) ^ (digest.POLYNOMIAL if raw & 1 else 0)
    return raw


def test_check_value(path: str) -> None:
    assert native.crc64(b"123456789") == 0xAE8B14860A799888
    assert native.digest(b"123456789") == "crc64nvme:ae8b14860a799888"


@SAME_PATH
@given(data=st.binary(max_size=700), cut=st.integers(0, 700), zeros=st.integers(0, 100))
def test_digests_are_those_of_the_definition(path: str, data: bytes, cut: int, zeros: int) -> None:
    raw = native.raw_crc64(data)
    assert raw == by_bits(data)
    head, tail = data[:cut], data[cut:]
    assert raw == native.shift(native.raw_crc64(head), len(tail)) ^ native.raw_crc64(tail)
    assert native.shift(raw, zeros) == by_bits(data + bytes(zeros))
    copy = np.full(len(data) + 1, 0xAA, np.uint8)
    assert native.copy_raw_crc64(copy[:-1], data) == raw
    assert copy.tobytes() == data + b"\xaa"


@pytest.mark.parametrize("size_bytes", [0, 1, 16383, 16384, 16385, 100_000])
def test_granules(path: str, size_bytes: int) -> None:
    data = counting(size_bytes)
    granules = native.raw_granules(data)
    assert [int(raw) for raw in granules] == [
        by_bits(data[i : i + 16384].tobytes()) for i in range(0, size_bytes, 16384)
    ]
    assert digest.combine_granules(granules, 16384, size_bytes) == native.raw_crc64(data)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extents = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, extents), shape


@SAME_PATH
@given(where=boxes(), item_bytes=st.sampled_from([1, 2, 4, 8, 16]))
def test_a_box_counts_as_its_tensor_with_zeros_elsewhere(
    path: str, where: tuple[Box, tuple[int, ...]], item_bytes: int
) -> None:
    box, shape = where
    tensor = np.zeros((*shape, item_bytes), np.uint8)
    part = counting(box.size * item_bytes, seed=7).reshape(*box.shape, item_bytes)
    tensor[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))] = part
    assert native.raw_positioned(part.reshape(-1), box, shape, item_bytes) == by_bits(tensor.tobytes())


def test_wrong_sizes_are_refused(path: str) -> None:
    with pytest.raises(LayoutError):
        native.raw_positioned(b"12345", Box((0,), (3,)), (4,), 2)
    with pytest.raises(LayoutError):
        native.raw_crc64(np.zeros((4, 4), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="cannot copy"):
        native.copy_raw_crc64(np.zeros(3, np.uint8), b"1234")


def views() -> st.SearchStrategy[NDArray[np.generic]]:
    """Views of one array: cut, stepped, reversed, transposed, repeated."""

    @st.composite
    def build(draw: st.DrawFn) -> NDArray[np.generic]:
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
        dtype = np.dtype(draw(st.sampled_from(["u1", "u2", "u4", "u8", "c16", "V3"])))
        base: NDArray[np.generic] = counting(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        view = base[tuple(slice(None, None, draw(st.sampled_from([1, 2, 3, -1]))) for _ in shape)]
        view = view.transpose(draw(st.permutations(range(len(shape)))))
        if draw(st.booleans()):
            view = np.broadcast_to(view, (draw(st.integers(1, 3)), *view.shape))
        return view

    return build()


def loops_of(view: NDArray[np.generic]) -> NDArray[np.int64]:
    return np.array(list(zip(view.shape, view.strides, strict=True)), np.int64).reshape(-1, 2)


@SAME_PATH
@given(view=views(), data=st.data())
def test_gather(path: str, view: NDArray[np.generic], data: st.DataObject) -> None:
    packed = view.tobytes()
    begin = data.draw(st.integers(0, len(packed)))
    end = data.draw(st.integers(begin, len(packed)))
    got = np.empty(end - begin, np.uint8)
    native.gather(got, view.ctypes.data, view.itemsize, loops_of(view), begin)
    assert got.tobytes() == packed[begin:end]


@SAME_PATH
@given(view=views(), data=st.data())
def test_scatter(path: str, view: NDArray[np.generic], data: st.DataObject) -> None:
    if 0 in view.strides:
        return
    view = view.copy(order="K")[..., :]
    expected = bytearray(view.tobytes())
    begin = data.draw(st.integers(0, len(expected)))
    source = counting(data.draw(st.integers(0, len(expected) - begin)), seed=99)
    expected[begin : begin + source.size] = source.tobytes()
    native.scatter(view.ctypes.data, source, view.itemsize, loops_of(view), begin)
    assert view.tobytes() == bytes(expected)


def test_regions_of_nothing(path: str) -> None:
    empty = np.zeros((3, 0, 2), np.uint8)
    native.gather(np.empty(0, np.uint8), empty.ctypes.data, 1, loops_of(empty))


@NEEDS_LIBRARY
def test_ranges_outside_a_region_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        native.gather(np.empty(9, np.uint8), counting(8).ctypes.data, 1, np.array([[8, 1]], np.int64))
