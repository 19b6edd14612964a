"""The thread on which done callbacks run: whatever they do, no save waits for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Callbacks:
    """Runs what it is given, one after the other, on a thread of its own that the first one starts."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __call__(self, run: Callable[[], None]) -> None:
        """Have ``run``, which raises nothing, run soon; at once, on this thread, where the callbacks are closed."""
        with self._guard:
            closed = self._closed
            if not closed:
                self._calls.put(run)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="ckptengine-callbacks", daemon=True)
                    self._thread.start()
        if closed:
            run()

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
            del run  # what it refers to is the user's: not to be held until the next one comes

    def close(self, timeout_s: float) -> None:
        """Run what is left, for at most ``timeout_s``.  A callback may call it."""
        with self._guard:
            self._closed = True
            self._calls.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
