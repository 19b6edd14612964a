"""Open files of a local folder, shared by threads and bounded in number."""

from __future__ import annotations

import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable

from ckptengine.errors import UnreadableFormat


class Handles:
    """A bounded set of open file descriptors that several threads read from."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Handle] = OrderedDict()

    def release(self, handle: Handle) -> None:
        """Let go of what `acquire` gave."""
        with self._lock:
            handle.release()

    def acquire(self, path: str, resolve: Callable[[str], str]) -> Handle:
        """The open file of a path, which stays open until it is released."""
        with self._lock:
            handle = self._open.get(path)
            if handle is not None:
                self._open.move_to_end(path)
                handle.users += 1
                return handle
        fresh = Handle(resolve(path))
        with self._lock:
            handle = self._open.get(path)
            if handle is not None:
                fresh.release()
            else:
                handle = self._open[path] = fresh
            handle.users += 1
            while len(self._open) > self._limit:
                self._open.popitem(last=False)[1].release()
            return handle

    def close(self) -> None:
        with self._lock:
            while self._open:
                self._open.popitem()[1].release()

    def __del__(self) -> None:
        self.close()


class Handle:
    """One open file; closed when the set and every reader have let go of it."""

    def __init__(self, real: str) -> None:
        self.users = 1
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        self.fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        status = os.fstat(self.fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            raise UnreadableFormat(f"{real} is not a regular file")

    def release(self) -> None:
        self.users -= 1
        if not self.users:
            os.close(self.fd)
