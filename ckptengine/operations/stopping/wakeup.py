"""Hearing of a signal at once, whatever the main thread is at.

Python runs a signal's handler between two steps of the main thread, which a call into native code may keep from coming
for ever: a collective whose other ranks are gone, storage that hangs.  The kernel's own handler writes the signal's
number to a pipe, on which a thread of ours waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable


class Wakeup:
    """Has ``call`` run on a background thread whenever the signal ``number`` comes in, until `close`.

    Made, and closed, by the main thread.  Whoever waited for the process's signals before (asyncio does) still hears of
    all of them.
    """

    def __init__(self, number: int, call: Callable[[], None]) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writing, False)
        self._former = _Former(signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False))
        self._thread = threading.Thread(
            target=_listen,
            args=(self._reading, number, call, self._former),
            name="ckptengine-signals",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        """Put back what was there before, unless somebody has put something else there since."""
        self._let_go(self._former.descriptor if self._former.is_open else -1)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._writing)
        os.close(self._reading)

    def in_child(self) -> None:
        """In a forked child: what comes in there is not for the parent, with whom the pipe is shared."""
        self._let_go(-1)
        os.close(self._writing)
        os.close(self._reading)

    def _let_go(self, former: int) -> None:
        found = signal.set_wakeup_fd(former, warn_on_full_buffer=False)
        if found != self._writing:
            signal.set_wakeup_fd(found, warn_on_full_buffer=False)


class _Former:
    """Where signals were written to before: not any more once that is closed, as its number may be any file's then."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._was = descriptor, _identity(descriptor)

    @property
    def is_open(self) -> bool:
        return self._was is not None and _identity(self.descriptor) == self._was

    def write(self, came: int) -> None:
        if self.is_open:
            with contextlib.suppress(OSError):
                os.write(self.descriptor, bytes([came]))


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _listen(reading: int, number: int, call: Callable[[], None], former: _Former) -> None:
    while True:
        for came in os.read(reading, 64):
            if came == 0:
                return
            former.write(came)
            if came == number:
                call()
