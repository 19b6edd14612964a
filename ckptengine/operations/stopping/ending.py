"""The end of a checkpointer, whoever brings it about: its owner, the garbage collector, the interpreter's exit."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from ckptengine.coordination.port import Coordinator
from ckptengine.operations.levels.places import Places
from ckptengine.operations.save import CANCEL_S, Saver
from ckptengine.operations.saving.callbacks import Callbacks
from ckptengine.operations.saving.troubles import Troubles
from ckptengine.operations.stopping.stopping import Stopping

CLOSE_AT_EXIT_S = 60.0
"""How long saves in flight are waited for when nobody closed their checkpointer."""


@dataclass(slots=True)
class Ending:
    """Finishes what is in flight and lets the root go, once.  Refers to the parts only: their owner may be garbage.

    Does nothing in a forked child.  ``stopping``: where SIGTERM is watched for, which may say how long there is.
    """

    saver: Saver
    troubles: Troubles
    stopping: Stopping | None
    places: Places
    callbacks: Callbacks
    port: Coordinator
    pid: int
    ended: bool = False

    def end(self, timeout_s: float | None) -> None:
        """Within ``timeout_s``.  What interrupts the waiting (a second Ctrl-C, say) cuts off what is in flight."""
        if self.ended or os.getpid() != self.pid:
            return
        try:
            self._end(timeout_s)
        except BaseException:
            self._end(0.0)
            raise
        finally:
            self.ended = True
            if self.stopping is not None:
                self.stopping.close()

    def collected(self) -> None:
        """The owner is garbage, found on any thread: one of ours must not wait for itself."""
        if not threading.current_thread().name.startswith("ckptengine"):
            self.end(CLOSE_AT_EXIT_S)
        elif os.getpid() == self.pid:
            threading.Thread(target=self.end, args=(CLOSE_AT_EXIT_S,), name="ckptengine-end").start()

    def _end(self, timeout_s: float | None) -> None:
        if self.stopping is not None:
            timeout_s = self.stopping.linger(self.troubles.under_way, timeout_s)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self.saver.close(timeout_s)
        self.places.drain(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        self.callbacks.close(CANCEL_S)  # while the root is still ours: they may write to it
        self.places.close()
        self.port.close()
