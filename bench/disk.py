"""The machine's own limits: how fast files are written and read, memory copied and digested, without any engine.

Direct I/O goes from and to page-aligned buffers; where the file system refuses it, the buffered path is measured and
the result says so.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import hashlib
import mmap
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

BLOCK_BYTES = 4 << 20
ALIGNMENT_BYTES = 4096


def aligned_buffer(size_bytes: int) -> mmap.mmap:
    """Page-aligned anonymous memory, every page touched."""
    buffer = mmap.mmap(-1, size_bytes)
    page = bytes(range(256)) * (ALIGNMENT_BYTES // 256)
    for start in range(0, size_bytes, ALIGNMENT_BYTES):
        buffer[start : start + ALIGNMENT_BYTES] = page[: min(ALIGNMENT_BYTES, size_bytes - start)]
    return buffer


def round_up(size_bytes: int) -> int:
    """To whole aligned blocks, as direct I/O wants them."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A descriptor opened with O_DIRECT where the file system takes it, and whether it did."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o666), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags, 0o666), False


def write_file(path: Path, size_bytes: int, buffer: mmap.mmap, *, direct: bool = True) -> float:
    """Write `size_bytes` into a new file in blocks of `BLOCK_BYTES`, sync it and its directory; seconds.

    `buffer` (aligned, of whole blocks or of all bytes) is written from its beginning, over and over again: one of a
    single block stays in the processor's cache and shows the limit of the device, one as large as the file that of the
    device fed from memory.
    """
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
    view = memoryview(buffer)
    start = time.perf_counter()
    descriptor = open_direct(path, flags)[0] if direct else os.open(path, flags, 0o666)
    try:
        total = round_up(size_bytes)
        done = 0
        while done < total:
            at = done % len(view)
            done += os.pwrite(descriptor, view[at : at + min(BLOCK_BYTES, len(view) - at, total - done)], done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return time.perf_counter() - start


def read_file(path: Path, *, direct: bool = True, threads: int = 4) -> float:
    """Read all of a file, in blocks, with several threads into buffers of their own; seconds."""
    total = path.stat().st_size
    buffers = [aligned_buffer(BLOCK_BYTES) for _ in range(threads)]

    def read_part(number: int) -> None:
        descriptor = open_direct(path, os.O_RDONLY)[0] if direct else os.open(path, os.O_RDONLY)
        try:
            for offset in range(number * BLOCK_BYTES, total, threads * BLOCK_BYTES):
                os.preadv(descriptor, [buffers[number]], offset)
        finally:
            os.close(descriptor)

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_part, range(threads)))
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True, slots=True)
class Rate:
    """One measured limit."""

    name: str
    bytes_per_s: float
    seconds: float


def _timed(name: str, size_bytes: int, work: Callable[[], object]) -> Rate:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return Rate(name, size_bytes / seconds, seconds)


def file_rates(folder: Path, size_bytes: int) -> list[Rate]:
    """Sequential writes and reads of one file of `size_bytes` under `folder`, and one small fsync."""
    path = folder / "limit.bin"
    probe, direct_works = open_direct(folder / "probe.bin", os.O_CREAT | os.O_WRONLY)
    os.close(probe)
    suffix = "" if direct_works else " (refused: buffered)"
    buffer = aligned_buffer(BLOCK_BYTES)
    total = round_up(size_bytes)
    rates = []
    for name, direct in ((f"direct write{suffix}", True), ("buffered write", False)):
        seconds = write_file(path, total, buffer, direct=direct)
        rates.append(Rate(f"{name} + fsync", total / seconds, seconds))
    for name, direct in ((f"direct read{suffix}", True), ("buffered read, cold", False)):
        _drop(path)
        seconds = read_file(path, direct=direct)
        rates.append(Rate(name, total / seconds, seconds))
    seconds = read_file(path, direct=False)
    rates.append(Rate("buffered read, warm", total / seconds, seconds))
    path.unlink()
    small = folder / "small.bin"
    seconds = write_file(small, ALIGNMENT_BYTES, buffer, direct=False)
    rates.append(Rate("create + fsync of 4 KiB", ALIGNMENT_BYTES / seconds, seconds))
    small.unlink()
    (folder / "probe.bin").unlink()
    return rates


def _drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def memory_rates(size_bytes: int, crc64: Callable[[memoryview], object] | None = None) -> list[Rate]:
    """First touch, copy and digests of `size_bytes` of memory, one thread each."""
    source = mmap.mmap(-1, size_bytes)
    block = bytes(1 << 20)

    def touch(target: mmap.mmap) -> None:
        for start in range(0, size_bytes, len(block)):
            target[start : start + len(block)] = block[: min(len(block), size_bytes - start)]

    rates = [_timed("first touch of memory", size_bytes, lambda: touch(source))]
    target = mmap.mmap(-1, size_bytes)
    touch(target)
    view, into = memoryview(source), memoryview(target)

    def copy() -> None:
        into[:] = view

    rates.append(_timed("copy in memory", size_bytes, copy))
    rates.append(_timed("sha256", size_bytes, lambda: hashlib.sha256(view)))
    rates.append(_timed("crc32 (zlib)", size_bytes, lambda: zlib.crc32(view)))
    if crc64 is not None:
        rates.append(_timed("crc64nvme (ckptengine)", size_bytes, lambda: crc64(view)))
    return rates
