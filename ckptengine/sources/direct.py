"""Large reads of local files past the page cache, for data that is read once: several times as fast when it is cold."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptengine.errors import Truncated
from ckptengine.sources import buffers
from ckptengine.sources.port import Files

LEAST_BYTES = 1 << 20
"""Smaller reads go through the page cache, unless they follow each other."""

BUFFER_BYTES = 4 << 20
"""One aligned buffer of this size per thread."""

_ALIGNMENT = 4096

AHEAD_SHARE = 4
"""Read-ahead is at most this part of the bytes that were wanted in a row."""

NEAR_BYTES = 64 << 10
"""A read that begins this close behind the last one of its thread is taken for the next of many."""


@dataclass(slots=True)
class _Thread:
    """What one thread holds: a buffer, which bytes of which file are in it, and how many were wanted in a row."""

    buffer: memoryview
    path: str = ""
    start: int = 0
    length: int = 0
    last_end: int = 0
    streak_bytes: int = 0

    def holds(self, path: str, offset: int, nbytes: int) -> bool:
        return path == self.path and self.start <= offset and offset + nbytes <= self.start + self.length

    def follows(self, path: str, offset: int) -> bool:
        return path == self.path and 0 <= offset - self.last_end <= NEAR_BYTES


class DirectReads:
    """`Files.read_into` with direct I/O where the file is local and the file system can.

    Small reads that follow each other in a file are served from one large one.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._threads = threading.local()
        self._refused = not hasattr(os, "O_DIRECT")

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """Like `Files.read_into`."""
        view = view.cast("B")
        if self._refused or not len(view):
            self._files.read_into(path, offset, view)
            return
        mine = self._mine()
        if mine.holds(path, offset, len(view)):
            at = offset - mine.start
            buffers.copy(view, mine.buffer[at : at + len(view)])
            mine.last_end = offset + len(view)
            mine.streak_bytes += len(view)
            return
        mine.streak_bytes = len(view) + (mine.streak_bytes if mine.follows(path, offset) else 0)
        # As with the kernel's read-ahead: what may be read in vain is a fraction of what was wanted in a row so far.
        ahead_bytes = min(BUFFER_BYTES, mine.streak_bytes // AHEAD_SHARE) if len(view) < LEAST_BYTES else 0
        ahead = ahead_bytes > len(view)
        local = self._files.local_path(path) if ahead or len(view) >= LEAST_BYTES else None
        if local is None or not self._read(local, path, offset, view, mine, ahead_bytes if ahead else 0):
            self._files.read_into(path, offset, view)
            mine.path, mine.length = path, 0
        mine.last_end = offset + len(view)

    def read_many(self, path: str, ranges: Sequence[tuple[int, memoryview]]) -> None:
        """`read_into` for many ranges of one file, which are given in the order in which they lie there."""
        for group in _near(ranges):
            last, view = group[-1]
            start, end = group[0][0], last + len(view)
            local = self._files.local_path(path) if end - start >= LEAST_BYTES and not self._refused else None
            if local is None or len(group) == 1 or not self._read_group(local, path, group, end):
                for offset, out in group:
                    self.read_into(path, offset, out)

    def _read_group(self, local: str, path: str, group: Sequence[tuple[int, memoryview]], end: int) -> bool:
        """Read ranges from the first one to byte ``end`` through the buffer; False where direct I/O is refused."""
        mine = self._mine()
        mine.path, mine.length = "", 0  # the buffer is filled anew
        try:
            fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW)
        except OSError:
            self._refused = True
            return False
        first = 0
        start = group[0][0] // _ALIGNMENT * _ALIGNMENT
        try:
            while start < end:
                got = os.preadv(fd, [mine.buffer[: min(BUFFER_BYTES, _up(end - start))]], start)
                stop = start + got
                while first < len(group) and group[first][0] < stop:
                    offset, view = group[first]
                    a, b = max(offset, start), min(offset + len(view), stop)
                    buffers.copy(view[a - offset : b - offset], mine.buffer[a - start : b - start])
                    if b < offset + len(view):
                        break
                    first += 1
                if stop < end and (not got or got % _ALIGNMENT):
                    raise Truncated(f"{self._files.root}/{path} ends at byte {stop}, {end - stop} bytes too early")
                start = stop
        except OSError:
            self._refused = True
            return False
        else:
            return True
        finally:
            os.close(fd)

    def _read(self, local: str, path: str, offset: int, view: memoryview, mine: _Thread, ahead_bytes: int) -> bool:
        """False where direct I/O is refused; the ordinary way then also tells what is wrong with the file."""
        try:
            fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW)
        except OSError:
            self._refused = True
            return False
        try:
            done = 0 if ahead_bytes else _in_place(fd, offset, view)
            while done < len(view):
                at = offset + done
                start = at // _ALIGNMENT * _ALIGNMENT
                wanted = min(BUFFER_BYTES, _up(at - start + max(ahead_bytes, len(view) - done)))
                mine.path, mine.start, mine.length = path, start, 0
                mine.length = os.preadv(fd, [mine.buffer[:wanted]], start)
                take = min(start + mine.length - at, len(view) - done)
                if take <= 0:
                    raise Truncated(f"{self._files.root}/{path} ends at byte {at}, {len(view) - done} bytes too early")
                buffers.copy(view[done : done + take], mine.buffer[at - start : at - start + take])
                done += take
        except OSError:
            self._refused = True
            return False
        else:
            mine.path = path
            return True
        finally:
            os.close(fd)

    def _mine(self) -> _Thread:
        if not hasattr(self._threads, "mine"):
            self._threads.mine = _Thread(memoryview(buffers.take(BUFFER_BYTES)))
        found: _Thread = self._threads.mine
        return found


def _near(ranges: Sequence[tuple[int, memoryview]]) -> Iterator[Sequence[tuple[int, memoryview]]]:
    """Ranges in groups that lie near each other, without overlaps."""
    first = 0
    for position in range(1, len(ranges) + 1):
        if position < len(ranges):
            before, view = ranges[position - 1]
            if 0 <= ranges[position][0] - before - len(view) <= NEAR_BYTES:
                continue
        yield ranges[first:position]
        first = position


def _up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _in_place(fd: int, offset: int, view: memoryview) -> int:
    """Bytes that were read straight into an aligned view from an aligned offset."""
    pages = len(view) // _ALIGNMENT * _ALIGNMENT
    if offset % _ALIGNMENT or np.frombuffer(view, np.uint8).ctypes.data % _ALIGNMENT:
        return 0
    done = 0
    while done < pages:
        got = os.preadv(fd, [view[done : min(pages, done + BUFFER_BYTES)]], offset + done)
        done += got
        if got % _ALIGNMENT or not got:  # the end of the file: the other way tells whether it is too early
            break
    return done
