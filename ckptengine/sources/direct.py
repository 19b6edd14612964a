"""Large reads of local files past the page cache, for data that is read once: several times as fast when it is cold."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np

from ckptengine.errors import Truncated
from ckptengine.sources.port import Files

LEAST_BYTES = 1 << 20
"""Smaller reads go through the page cache."""

BUFFER_BYTES = 4 << 20
"""One aligned buffer of this size per thread."""

_ALIGNMENT = 4096


class DirectReads:
    """`Files.read_into` with direct I/O where the file is local and the file system can."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._local = threading.local()
        self._refused = not hasattr(os, "O_DIRECT")

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """Like `Files.read_into`."""
        local = self._files.local_path(path) if len(view) >= LEAST_BYTES and not self._refused else None
        if local is None or not self._read(local, path, offset, view.cast("B")):
            self._files.read_into(path, offset, view)

    def _read(self, local: str, path: str, offset: int, view: memoryview) -> bool:
        """False where direct I/O is refused; the ordinary way then also tells what is wrong with the file."""
        try:
            fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW)
        except OSError:
            self._refused = True
            return False
        try:
            return self._fill(fd, path, offset, view)
        except OSError:
            self._refused = True
            return False
        finally:
            os.close(fd)

    def _fill(self, fd: int, path: str, offset: int, view: memoryview) -> bool:
        done = self._in_place(fd, offset, view)
        buffer = self._buffer()
        while done < len(view):
            at = offset + done
            skip = at % _ALIGNMENT
            wanted = min(BUFFER_BYTES, -(-(skip + len(view) - done) // _ALIGNMENT) * _ALIGNMENT)
            got = os.preadv(fd, [buffer[:wanted]], at - skip) - skip
            if got <= 0:
                raise Truncated(f"{self._files.root}/{path} ends at byte {at}, {len(view) - done} bytes too early")
            take = min(got, len(view) - done)
            view[done : done + take] = buffer[skip : skip + take]
            done += take
        return True

    def _in_place(self, fd: int, offset: int, view: memoryview) -> int:
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

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        found: memoryview = self._local.buffer
        return found
