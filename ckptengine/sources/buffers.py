"""Page-aligned buffers that are used again: to touch fresh memory takes several times as long as to copy into it."""

from __future__ import annotations

import mmap
import threading

import numpy as np

KEPT_BYTES = 64 << 20
"""Free buffers are kept up to this size together; about what one unit of work gives back."""

_LARGE_BYTES = 32 << 10

_lock = threading.Lock()
_free: list[mmap.mmap] = []


def take(nbytes: int) -> mmap.mmap:
    """A buffer of exactly this size; what it holds is undefined."""
    with _lock:
        for position in range(len(_free) - 1, -1, -1):  # the one that was used last is in the cache
            if len(_free[position]) == nbytes:
                return _free.pop(position)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, nbytes, **private)


def give(buffer: mmap.mmap) -> None:
    """Give back a buffer that nobody reads or writes any more."""
    with _lock:
        _free.append(buffer)
        while sum(map(len, _free)) > KEPT_BYTES:
            del _free[0]


def clear() -> None:
    """Let go of the buffers that are free."""
    with _lock:
        _free.clear()


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes into as many; other threads run meanwhile, which they do not while a slice is assigned."""
    if len(source) < _LARGE_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
