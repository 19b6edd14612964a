"""Waiting for something to become true, where a Ctrl-C may come at any instruction."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Waiting:
    """Threads that wait for one another's changes; like a condition, without a lock.

    `threading.Condition` lets its lock go, waits and takes it again in Python: a Ctrl-C in between leaves it as a
    RuntimeError about that lock, not as KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._calls: list[queue.SimpleQueue[None]] = []

    def wait_for(self, holds: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Block until ``holds()``, which is asked again after each `notify_all`; False when the time ran out.

        Not with a lock held that whoever makes it true needs.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        call: queue.SimpleQueue[None] = queue.SimpleQueue()
        try:
            self._calls.append(call)  # first, so that no change is missed
            while not holds():
                left_s = threading.TIMEOUT_MAX if until_s is None else until_s - time.monotonic()
                if left_s <= 0:
                    return False
                try:
                    call.get(timeout=min(left_s, threading.TIMEOUT_MAX))
                except queue.Empty:
                    continue
            return True
        finally:
            if call in self._calls:
                self._calls.remove(call)

    def notify_all(self) -> None:
        """Something has changed."""
        for call in tuple(self._calls):
            call.put(None)
