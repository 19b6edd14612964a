"""Reads past the page cache: every byte right, whatever the alignment, order, threads and end of the file."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ckptengine.errors import NotFound, Truncated
from ckptengine.sources.direct import BUFFER_BYTES, LEAST_BYTES, DirectReads
from ckptengine.sources.files import LocalFiles

SIZE = 3 * BUFFER_BYTES + 1234


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("direct")  # on a real disk, where direct I/O works


@pytest.fixture
def data(folder: Path) -> bytes:
    data = np.random.default_rng(3).bytes(SIZE)
    (folder / "f").write_bytes(data)
    (folder / "g").write_bytes(data[::-1])
    return data


def aligned(nbytes: int, skew: int = 0) -> memoryview:
    room = np.zeros(nbytes + 8192, np.uint8)
    skip = -room.ctypes.data % 4096 + skew
    return room[skip : skip + nbytes].data


def ranges() -> list[tuple[int, int]]:
    rng = np.random.default_rng(1)
    found = [(0, SIZE), (1, SIZE - 1), (4096, 2 * BUFFER_BYTES), (SIZE - 1, 1), (SIZE, 0), (0, LEAST_BYTES)]
    found += [(4096 * 3, SIZE - 4096 * 3), (SIZE - LEAST_BYTES, LEAST_BYTES)]
    at = 0
    while at + 300_000 < SIZE:  # neighbours, some with gaps
        size = int(rng.integers(1, 300_000))
        found.append((at, size))
        at += size + int(rng.integers(0, 2)) * int(rng.integers(0, 100_000))
    found += [(int(o), int(rng.integers(1, SIZE - o))) for o in rng.integers(0, SIZE - 1, 20)]
    return found


@pytest.mark.parametrize("skew", [0, 512, 1])
def test_every_range_is_what_the_file_holds(folder: Path, data: bytes, skew: int) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    for position, (offset, nbytes) in enumerate(ranges()):
        view = aligned(nbytes, skew)
        name = "g" if position % 7 == 6 else "f"
        reads.read_into(name, offset, view)
        truth = data[::-1] if name == "g" else data
        assert bytes(view) == truth[offset : offset + nbytes], (offset, nbytes)


def test_many_ranges_at_once(folder: Path, data: bytes) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    wanted = sorted(r for r in ranges() if r[1])  # neighbours, overlaps and the whole file
    views = [bytearray(nbytes) for _, nbytes in wanted]
    reads.read_many("f", [(offset, memoryview(view)) for (offset, _), view in zip(wanted, views, strict=True)])
    for (offset, nbytes), view in zip(wanted, views, strict=True):
        assert bytes(view) == data[offset : offset + nbytes], (offset, nbytes)


def test_neighbours_are_read_once(folder: Path, data: bytes) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    wanted = [(at, bytearray(100_000)) for at in range(17, SIZE - 100_000, 100_100)]
    before = read_so_far()
    reads.read_many("f", [(at, memoryview(view)) for at, view in wanted])
    assert read_so_far() - before < 1.02 * SIZE
    assert all(view == data[at : at + 100_000] for at, view in wanted)


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def test_many_ranges_of_a_file_that_ends_early(folder: Path, data: bytes) -> None:
    views = [memoryview(bytearray(LEAST_BYTES)) for _ in range(2)]
    with pytest.raises(Truncated, match="/f"):
        DirectReads(LocalFiles(str(folder))).read_many("f", [(SIZE - LEAST_BYTES, views[0]), (SIZE, views[1])])


def test_threads_do_not_share_buffers(folder: Path, data: bytes) -> None:
    reads = DirectReads(LocalFiles(str(folder)))

    def check(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        at = int(rng.integers(0, SIZE // 2))
        for _ in range(20):
            size = int(rng.integers(1, 200_000))
            view = bytearray(size)
            reads.read_into("f", at, memoryview(view))
            if bytes(view) != data[at : at + size]:
                return False
            at += size
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(12)))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of the operating system from here on."""
    sizes: list[int] = []
    real = os.preadv

    def counted(fd: int, views: list[memoryview], offset: int) -> int:
        got = real(fd, views, offset)
        sizes.append(got)
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


def test_neighbours_are_read_together(folder: Path, data: bytes, sizes: list[int]) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    view = bytearray(10_000)
    for start in range(0, BUFFER_BYTES, 10_000):
        reads.read_into("f", start, memoryview(view))
        assert bytes(view) == data[start : start + 10_000]
    assert len(sizes) <= 40
    assert sum(sizes) <= 1.3 * BUFFER_BYTES


def test_little_is_read_in_vain_where_neighbours_are_few(folder: Path, data: bytes, sizes: list[int]) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    view = bytearray(10_000)
    wanted = 0
    for first in range(SIZE - 60_000, 0, -60_000):  # pieces of six, from the last to the first
        for start in range(first, first + 60_000, 10_000):
            reads.read_into("f", start, memoryview(view))
            assert bytes(view) == data[start : start + 10_000]
            wanted += len(view)
    assert sum(sizes) <= 1.3 * wanted


def test_the_end_of_a_file_is_no_data(folder: Path, data: bytes) -> None:
    reads = DirectReads(LocalFiles(str(folder)))
    for offset, nbytes in [(SIZE - 10, 11), (0, SIZE + 1), (SIZE, 1), (SIZE - LEAST_BYTES, LEAST_BYTES + 4096)]:
        with pytest.raises(Truncated, match="f"):
            reads.read_into("f", offset, aligned(nbytes))
    small = bytearray(1000)
    reads.read_into("f", SIZE - 2000, memoryview(small))
    reads.read_into("f", SIZE - 1000, memoryview(small))
    assert bytes(small) == data[-1000:]
    with pytest.raises(Truncated, match="f"):
        reads.read_into("f", SIZE - 10, memoryview(small))
    with pytest.raises(NotFound, match="nothing"):
        reads.read_into("nothing", 0, aligned(LEAST_BYTES))
