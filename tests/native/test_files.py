"""Reading ranges: every byte where it belongs, digests on the way, and clear errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ckptengine import native
from ckptengine.errors import StorageFailed, Truncated
from ckptengine.layout.digest import combine_granules
from tests.native.conftest import NEEDS_LIBRARY, Target, counting

FILE_BYTES = 9_000_001
"""More than two blocks of a read, and no multiple of anything."""


def wanted(spans: list[tuple[int, int]]) -> tuple[NDArray[np.void], list[NDArray[np.uint8]], int]:
    """Ranges to (offset, size) spans with destinations that are congruent for every other one."""
    ranges = np.zeros(len(spans), native.RANGE)
    targets, slot = [], 0
    for number, (offset, size) in enumerate(spans):
        room = np.full(size + 4096, 0x77, np.uint8)
        start = (offset - room.ctypes.data) % 512 if number % 2 else 3
        targets.append(room[start : start + size])
        ranges[number] = (offset, size, room.ctypes.data + start, slot)
        slot += -(-size // 16384)
    return ranges, targets, slot


def spans() -> list[tuple[int, int]]:
    random = np.random.default_rng(5)
    chosen = [(0, FILE_BYTES), (FILE_BYTES - 1, 1), (4 << 20, 4 << 20), (100, 0), (511, 2)]
    for offset in random.integers(0, FILE_BYTES, 30).tolist():
        chosen.append((offset, int(random.integers(0, min(300_000, FILE_BYTES - offset)))))
    return chosen


@pytest.mark.parametrize("threads", [1, 4])
def test_ranges_arrive(path: str, target: Target, threads: int) -> None:
    content = counting(FILE_BYTES)
    os.pwrite(target.files.buffered, content, 0)
    ranges, targets, slots = wanted(spans())
    for granule_bytes in (0, 16384):
        for part in targets:
            part[...] = 0
        got = native.read_ranges(
            target.files,
            ranges,
            threads=threads,
            granule_bytes=granule_bytes,
            granule_slots=slots if granule_bytes else 0,
        )
        for record, part, raw in zip(ranges, targets, got.ranges, strict=True):
            offset, size, _, slot = (int(value) for value in record)
            assert np.array_equal(part, content[offset : offset + size])
            assert int(raw) == native.raw_crc64(part)
            if granule_bytes:
                granules = got.granules[slot : slot + -(-size // granule_bytes)]
                assert combine_granules(granules, granule_bytes, size) == int(raw)


def test_digest_only(path: str, target: Target) -> None:
    content = counting(500_000)
    os.pwrite(target.files.buffered, content, 0)
    ranges = np.array([(1000, 499_000, 0, 0)], native.RANGE)
    assert int(native.read_ranges(target.files, ranges).ranges[0]) == native.raw_crc64(content[1000:])


def test_a_short_file_is_damage(path: str, target: Target) -> None:
    os.pwrite(target.files.buffered, counting(10_000), 0)
    ranges, _kept, _slots = wanted([(0, 9000), (9000, 1001)])
    with pytest.raises(Truncated, match=r"range 1 of rank\.bin.*ends at byte 10000"):
        native.read_ranges(target.files, ranges)


def test_a_closed_file_is_refused_by_name(path: str, tmp_path: Path) -> None:
    ranges, _kept, _slots = wanted([(0, 9000)])
    with pytest.raises(StorageFailed, match=r"gone\.bin.*errno 9"):
        native.read_ranges(native.Files(name="gone.bin", buffered=1 << 20), ranges)


@NEEDS_LIBRARY
def test_a_bad_disk(target: Target, faults: None) -> None:
    os.pwrite(target.files.buffered, counting(10_000), 0)
    ranges, _kept, _slots = wanted([(0, 9000)])
    native.arm_fault("read", error=errno.EIO, sticky=True)
    with pytest.raises(StorageFailed) as caught:
        native.read_ranges(target.files, ranges)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


@NEEDS_LIBRARY
def test_a_file_system_that_refuses_direct_reads(target: Target, faults: None) -> None:
    if target.files.direct < 0:
        pytest.skip("no direct I/O here")
    content = counting(3_000_000)
    os.pwrite(target.files.buffered, content, 0)
    ranges, targets, _slots = wanted([(77, 2_900_000)])
    native.arm_fault("read", error=errno.EINVAL)
    assert native.read_ranges(target.files, ranges, threads=1).direct_refused
    assert np.array_equal(targets[0], content[77 : 77 + 2_900_000])


def test_wrong_records_are_refused(path: str, target: Target) -> None:
    if path == "library":
        with pytest.raises(ValueError, match="one-dimensional array of"):
            native.read_ranges(target.files, np.zeros(3, np.uint8))


def test_probe(path: str, tmp_path: Path) -> None:
    support = native.probe_direct(str(tmp_path))
    assert support.supported == (support.reason == "")
    assert not list(tmp_path.iterdir())
    if path == "library":
        with pytest.raises(StorageFailed, match="no-such-directory"):
            native.probe_direct(str(tmp_path / "no-such-directory"))


def test_drop_cache(target: Target) -> None:
    assert native.drop_cache(target.files.buffered)
