"""Files: what direct I/O wants, and parallel reads that are digested on the way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import StorageFailed, Truncated
from ckptengine.layout import crc64, digest
from ckptengine.layout.digest import Words
from ckptengine.native.host_memory import memory
from ckptengine.native.library import RANGE, SEGMENT_BYTES, library, octets_of_records

BUFFERED_BYTES = 1 << 20
"""Of one read through the page cache: what has been read is still in the processor's cache when it is digested."""


@dataclass(frozen=True, slots=True)
class DirectSupport:
    """What O_DIRECT wants in a directory: alignment of memory and of file offsets in bytes; ``reason`` why not."""

    supported: bool
    memory_alignment: int = 1
    offset_alignment: int = 1
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """One file opened with O_DIRECT, without, or both (-1 for the other); the caller owns the descriptors.

    ``name`` is for messages.  The alignments are those that `probe_direct` found.
    """

    name: str
    direct: int = -1
    buffered: int = -1
    memory_alignment: int = 512
    offset_alignment: int = 512


def probe_direct(directory: str) -> DirectSupport:
    """What direct I/O wants in ``directory``, by statx and by writing 1 MiB; `StorageFailed` if it is not writable."""
    if library is None:
        return DirectSupport(False, reason="direct I/O needs the native library")
    try:
        return DirectSupport(*library.probe_direct(directory))
    except RuntimeError as error:
        raise StorageFailed(f"cannot probe {directory} for direct I/O: {error}; is it a writable directory?") from error


def drop_cache(descriptor: int) -> bool:
    """Drop a file's clean pages from the page cache, for cold measurements; False where that cannot be asked for."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


@dataclass(frozen=True, slots=True)
class ReadDigests:
    """Raw CRCs of what was read: one per range, and one per granule slot where granules were asked for."""

    ranges: Words
    granules: Words
    direct_refused: bool


def read_ranges(
    files: Files, ranges: NDArray[Any], *, threads: int = 4, granule_bytes: int = 0, granule_slots: int = 0
) -> ReadDigests:
    """Read ``ranges`` (of dtype `RANGE`, any order) to their addresses, digesting on the way.

    Destinations congruent to their file offset modulo the memory alignment are read straight into.  `Truncated` when
    the file ends too early, `StorageFailed` when the system refuses; destinations then hold anything.
    """
    if library is None:
        return _read_portable(files, ranges, granule_bytes, granule_slots)
    digests, granules, error, failed, refused = library.read_ranges(
        direct=files.direct,
        buffered=files.buffered,
        ranges=octets_of_records(ranges, RANGE),
        threads=threads,
        block_bytes=SEGMENT_BYTES if files.direct >= 0 else BUFFERED_BYTES,
        memory_alignment=files.memory_alignment,
        offset_alignment=files.offset_alignment,
        granule_bytes=granule_bytes,
        granule_slots=granule_slots,
    )
    if error is not None:
        code, operation, offset, message = error
        raise _read_error(files.name, code, operation, offset, message, f"range {failed}")
    return ReadDigests(digests, granules, bool(refused))


def _read_error(name: str, code: int, operation: str, offset: int, message: str, what: str) -> Exception:
    if code == 0:
        return Truncated(f"cannot read {what} of {name}: {message}; take another copy or an older step")
    failure = StorageFailed(f"cannot read {what} of {name} at byte {offset}: {message} (errno {code} in {operation})")
    failure.__cause__ = OSError(code, message)
    return failure


def _read_portable(files: Files, ranges: NDArray[Any], granule_bytes: int, granule_slots: int) -> ReadDigests:
    digests = np.zeros(len(ranges), np.uint64)
    granules = np.zeros(granule_slots, np.uint64)
    for index in np.argsort(ranges["file_offset"], kind="stable").tolist():
        offset, size, address, slot = (int(value) for value in ranges[index])
        raw = 0
        step = SEGMENT_BYTES // granule_bytes * granule_bytes or granule_bytes if granule_bytes else SEGMENT_BYTES
        for begin in range(0, size, step):
            part = min(step, size - begin)
            target = memory(address + begin, part) if address else np.empty(part, np.uint8)
            _read_fully(files, offset + begin, target, index)
            parts = crc64.raw_granules(target, granule_bytes or part)
            raw = digest.combine(raw, digest.combine_granules(parts, granule_bytes or part, part), part)
            if granule_bytes:
                first = slot + begin // granule_bytes
                granules[first : first + parts.size] = parts
        digests[index] = raw
    return ReadDigests(digests, granules, False)


def _read_fully(files: Files, offset: int, target: NDArray[np.uint8], index: int) -> None:
    done = 0
    while done < target.size:
        try:
            got = os.preadv(files.buffered, [target.data[done:]], offset + done)
        except OSError as error:
            code = error.errno or 0
            raise _read_error(files.name, code, "preadv", offset + done, os.strerror(code), f"range {index}") from error
        if got == 0:
            message = f"the file ends at byte {offset + done}, before byte {offset + target.size} that was to be read"
            raise _read_error(files.name, 0, "end of file", offset + done, message, f"range {index}")
        done += got
