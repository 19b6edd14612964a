"""File operations that fail, write short, tear, or end the process at the n-th one."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from ckptengine.store.files import FileOps

T = TypeVar("T")
Kind = Literal["fail", "late", "short", "tear", "kill", "delay"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at operation number ``at`` (from 0).

    ``fail``: refused with ``error``; ``late``: done, then reported as refused; ``short``: a write takes half;
    ``tear``: a write takes half and is refused; ``kill``: SIGKILL to this process; ``delay``: sleeps first.
    ``sticky``: so does every later one.
    """

    at: int
    kind: Kind = "fail"
    error: int = errno.EIO
    sticky: bool = False
    delay_s: float = 0.0


@dataclass
class FaultyOps(FileOps):
    """Counts operations from `arm` on and carries out one `Fault`."""

    fault: Fault | None = None
    count: int = 0
    log: list[str] = field(default_factory=list)
    hit: str = ""
    wake: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, fault: Fault | None) -> None:
        with self._guard:
            self.fault, self.count, self.hit, self.log = fault, 0, "", []

    def _decide(self, name: str) -> Fault | None:
        with self._guard:
            number, self.count = self.count, self.count + 1
            self.log.append(name)
            fault = self.fault
            if fault is None or number < fault.at or (number > fault.at and not fault.sticky):
                return None
            self.hit = self.hit or name
            return fault

    def _do(self, name: str, call: Callable[[], T]) -> T:
        fault = self._decide(name)
        if fault is None or fault.kind in ("short", "tear"):
            return call()
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "delay":
            self.wake.wait(fault.delay_s)
            return call()
        if fault.kind == "late" or name == "close":  # the system closes a descriptor whatever it reports
            call()
        raise OSError(fault.error, os.strerror(fault.error))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        fault = self._decide("pwrite")
        if fault is None:
            return super().pwrite(fd, data, offset)
        if fault.kind == "kill":
            super().pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "delay":
            self.wake.wait(fault.delay_s)
            return super().pwrite(fd, data, offset)
        if fault.kind in ("short", "tear"):
            done = super().pwrite(fd, data[: max(1, len(data) // 2)], offset)
            if fault.kind == "short":
                return done
        if fault.kind == "late":
            super().pwrite(fd, data, offset)
        raise OSError(fault.error, os.strerror(fault.error))

    def create(self, path: Path, mode: int = 0o666) -> int:
        made: list[int] = []

        def call() -> int:
            made.append(FileOps.create(self, path, mode))
            return made[0]

        try:
            return self._do("create", call)
        except OSError:
            for fd in made:  # a create that is reported as refused leaves the name, but nobody has the descriptor
                os.close(fd)
            raise

    def preallocate(self, fd: int, nbytes: int) -> None:
        self._do("preallocate", lambda: FileOps.preallocate(self, fd, nbytes))

    def truncate(self, fd: int, nbytes: int) -> None:
        self._do("truncate", lambda: FileOps.truncate(self, fd, nbytes))

    def fsync(self, fd: int) -> None:
        self._do("fsync", lambda: FileOps.fsync(self, fd))

    def close(self, fd: int) -> None:
        self._do("close", lambda: FileOps.close(self, fd))

    def link(self, source: Path, target: Path) -> None:
        self._do("link", lambda: FileOps.link(self, source, target))

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", lambda: FileOps.rename(self, source, target))

    def unlink(self, path: Path) -> None:
        self._do("unlink", lambda: FileOps.unlink(self, path))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._do("mkdir", lambda: FileOps.mkdir(self, path, mode))

    def rmdir(self, path: Path) -> None:
        self._do("rmdir", lambda: FileOps.rmdir(self, path))

    def fsync_dir(self, path: Path) -> None:
        self._do("fsync_dir", lambda: FileOps.fsync_dir(self, path))
