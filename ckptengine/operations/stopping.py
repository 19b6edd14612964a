"""SIGTERM: one last checkpoint at a step that all ranks agree on, within a deadline, then a clean exit.

The signal only sets a flag.  The next training-loop hook saves, waits as long as the deadline allows and raises
`SystemExit`.  Under several ranks rank 0 decides, for the coming call, and the others follow; a rank that alone got the
signal tells rank 0.  Whatever does not come to its end by the deadline, the loop, the save or what runs at exit, is
ended there; the interpreter as it takes itself apart, a few seconds later.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from types import FrameType

from ckptengine.coordination.port import Coordinator
from ckptengine.errors import CheckpointError
from ckptengine.operations.handle import SaveHandle

log = logging.getLogger("ckptengine")

EXIT_STATUS = 128 + signal.SIGTERM
_MOMENT_S = 1.0
_TEARDOWN_S = 5.0
"""What the interpreter has to take itself apart in, at least: with torch, on a loaded machine, that takes seconds."""


class Stopping:
    """Watches for SIGTERM on behalf of one checkpointer.  ``deadline_s``: from the signal to the end."""

    def __init__(self, port: Coordinator, deadline_s: float) -> None:
        self._port, self._budget_s = port, deadline_s
        self._requested = threading.Event()
        self._deadline_s = 0.0
        self._calls = 0
        self._told = self._finished = False
        self._decided = False
        self._timer: threading.Timer | None = None
        self._former: signal.Handlers | object | None = None
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._former = signal.signal(signal.SIGTERM, self._on_signal)
        else:
            log.warning("SIGTERM is not watched: the Checkpointer was made outside the main thread")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested.set()
        self._start_clock()

    def _start_clock(self) -> None:
        """The deadline holds from here on, whatever the process is at."""
        if self._timer is not None:
            return
        self._deadline_s = time.monotonic() + self._budget_s
        # A timer, because the loop may never come back to the hook.
        self._timer = threading.Timer(self._budget_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()
        atexit.register(self._bound_teardown)

    def _bound_teardown(self) -> None:
        """At exit: no thread runs while the interpreter takes itself apart, so that the kernel must end it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(_TEARDOWN_S, self._deadline_s - time.monotonic()))

    def _give_up(self) -> None:
        if not self._finished:
            log.error("the deadline of %g s after SIGTERM has passed: ending without a last checkpoint", self._budget_s)
        os._exit(EXIT_STATUS)

    def decided(self) -> bool:
        """Whether this hook call is the last one: the same answer on every rank.  Called once per hook call."""
        self._calls += 1
        if self._port.world == 1:
            return self._requested.is_set()
        if self._port.rank != 0:
            if self._requested.is_set() and not self._told:
                self._port.put(f"sigterm/{self._port.rank}", b"")
                self._told = True
            return self._port.has(f"stop/{self._calls}")
        if self._decided:
            return True
        asked = self._requested.is_set() or any(self._port.has(f"sigterm/{r}") for r in range(1, self._port.world))
        if asked:
            self._decided = True
            self._port.put(f"stop/{self._calls + 1}", b"")
        return False

    def left_s(self) -> float:
        """Seconds until the deadline, less a moment to end in."""
        self._start_clock()  # where the signal went to another rank
        return max(0.0, self._deadline_s - time.monotonic() - _MOMENT_S)

    def finish(self, handle: SaveHandle) -> None:
        """Wait for the last save as long as the deadline allows; says how far it came.

        What the process still does afterwards is bounded by the deadline too.
        """
        try:
            durable = handle.wait("durable", self.left_s())
        except CheckpointError as error:
            log.error("the last save, of step %d, failed: %s", handle.step, error, extra=_fields(handle))
            return
        finally:
            self._finished = True
        if durable:
            log.info("SIGTERM: step %d is durable, exiting", handle.step, extra=_fields(handle))
        else:
            log.error(
                "SIGTERM: the deadline of %g s came while step %d was %s; what has been committed stays, and the "
                "next job carries it on; exiting",
                *(self._budget_s, handle.step, handle.stage),
                extra=_fields(handle),
            )

    def close(self) -> None:
        """Put the former handler back."""
        if self._timer is not None and not self._finished:
            self._timer.cancel()
            atexit.unregister(self._bound_teardown)
        if self._installed and signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._former)  # type: ignore[arg-type]
        self._installed = False


def _fields(handle: SaveHandle) -> dict[str, object]:
    return {"ckptengine": {"step": handle.step, "stage": handle.stage}}
