"""The live lock of a local root: one writing job at a time.

A POSIX record lock: the kernel releases it when the holder dies, and forked children (data-loader workers) do not
inherit it.  Record locks do not exclude within one process, so a table of held roots does.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from pathlib import Path
from types import TracebackType

from ckptengine.errors import RootInUse
from ckptengine.store.files import storage_failed

_held: dict[tuple[int, int], Path] = {}
_held_guard = threading.RLock()  # garbage that is collected while one root is being taken may let another go


def _forget_parent() -> None:
    """In a forked child: the record locks are the parent's, and another thread of it may have been at the table."""
    global _held_guard
    _held_guard = threading.RLock()
    _held.clear()


os.register_at_fork(after_in_child=_forget_parent)


class RootLock:
    """Exclusive right to write beneath a root, from construction to `release`.  Raises `RootInUse`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pid = os.getpid()
        self._fd: int | None = None
        with _held_guard:
            self._acquire()

    def _acquire(self) -> None:
        try:
            # Looked at before it is opened: closing any descriptor of a file drops this process's record locks on it.
            status = os.stat(self._path)
            if (status.st_dev, status.st_ino) in _held:
                raise RootInUse(
                    f"{self._path.parent}: another Checkpointer of this process holds it; close that one first"
                )
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_failed("look at the lock", self._path, error) from error
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise storage_failed("open the lock", self._path, error) from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip() or "unknown"
            os.close(fd)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise storage_failed("lock", self._path, error) from error
            raise RootInUse(
                f"{self._path.parent}: another live job holds it ({holder}); stop that job or use another root"
            ) from None
        with contextlib.suppress(OSError):  # for people only: a full disk must not keep a job from restoring
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"host": socket.gethostname(), "pid": self._pid}).encode(), 0)
        status = os.fstat(fd)
        self._fd, self._key = fd, (status.st_dev, status.st_ino)
        _held[self._key] = self._path

    @property
    def stands(self) -> bool:
        """Whether the file that is locked is still the one of that name: not once the root was removed or replaced."""
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._key

    def release(self) -> None:
        """Give the root up; safe to call twice, and nothing in a forked child."""
        with _held_guard:
            if self._fd is None or os.getpid() != self._pid:
                return
            _held.pop(self._key, None)
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> RootLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
