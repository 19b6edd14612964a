"""Ranges of a rank file read verified: any range gives the file's bytes, and any wrong byte in it is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptengine as ce
from ckptengine.errors import Damaged, DigestMismatch
from ckptengine.operations.opening import open_any
from ckptengine.operations.verify import verify
from ckptengine.sources.native import NativeSource
from ckptengine.store.rankfile import HEADER_BYTES

SIZES = (1, 63, 64, 0, 200, 16384, 16385, 40_000, 5, 16384, 40_000, 33_000, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step: tensors of less, as much and more than a granule, with padding between them."""
    root = tmp_path_factory.mktemp("ranges")
    generator = torch.Generator().manual_seed(5)
    state = {
        f"t{i}": torch.randint(1, 255, (size,), dtype=torch.uint8, generator=generator) for i, size in enumerate(SIZES)
    }
    with ce.Checkpointer(state, root, random=False) as checkpointer:
        checkpointer.save(1).result()
    return root / "step-000000001"


def opened(folder: Path) -> NativeSource:
    source = open_any(str(folder))
    assert isinstance(source, NativeSource)
    return source


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_is_what_the_file_has_and_any_flipped_byte_in_it_is_found(folder: Path, data: st.DataObject) -> None:
    source = opened(folder)
    path = folder / source.reader.path(0)
    whole = path.read_bytes()
    end = source.reader.tail(0).table
    low, high = sorted(data.draw(st.tuples(*[st.integers(HEADER_BYTES, end)] * 2)))
    view = bytearray(high - low)
    source.read_verified(source.reader.path(0), low, memoryview(view))
    assert bytes(view) == whole[low:high]
    if low == high:
        return
    at = data.draw(st.integers(low, high - 1))
    try:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
        with pytest.raises(Damaged):
            opened(folder).read_verified(source.reader.path(0), low, memoryview(view))
    finally:
        path.write_bytes(whole)


def test_each_word_of_the_granule_table_is_compared(folder: Path) -> None:
    source = opened(folder)
    assert verify(source) == ([], 0)
    path = folder / source.reader.path(0)
    whole = path.read_bytes()
    tail = source.reader.tail(0)
    words = int(tail.starts[-1])
    assert words > len([size for size in SIZES if size])
    try:
        for word in range(words):
            at = tail.table + 8 * word + word % 8
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(DigestMismatch, match="granule table"):
                opened(folder).reader.check_granules(0)
    finally:
        path.write_bytes(whole)
