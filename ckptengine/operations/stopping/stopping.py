"""SIGTERM: one last checkpoint at a step that all ranks agree on, within a deadline, then a clean exit.

The signal only sets a flag.  The next training-loop hook saves, waits as long as the deadline allows and raises
`SystemExit`; where the loop has ended, closing raises it.  Under several ranks rank 0 decides, for the coming call, and
the others follow; a rank that alone got the signal tells rank 0.  Whatever does not come to its end by the deadline,
the loop, the save or what runs at exit, is ended there; the interpreter as it takes itself apart, a few seconds later.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType

from ckptengine.coordination.port import Coordinator
from ckptengine.errors import CheckpointError
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.operations.stopping.wakeup import Wakeup

log = logging.getLogger("ckptengine")

EXIT_STATUS = 128 + signal.SIGTERM
_MOMENT_S = 1.0
_POLL_S = 0.1
_TEARDOWN_S = 5.0
"""What the interpreter has to take itself apart in, at least: with torch, on a loaded machine, that takes seconds."""


class Stopping:
    """Watches for SIGTERM on behalf of one checkpointer.  ``deadline_s``: from the signal to the end."""

    def __init__(self, port: Coordinator, deadline_s: float) -> None:
        self._port, self._budget_s = port, deadline_s
        self._requested = threading.Event()
        self._ticking = threading.Lock()
        self._deadline_s = 0.0
        self._calls = 0
        self._told = self._finished = False
        self._decided = False
        self._former: signal.Handlers | object | None = None
        self._wakeup: Wakeup | None = None
        if _in_main_thread():
            self._former = signal.signal(signal.SIGTERM, self._on_signal)
            self._wakeup = Wakeup(signal.SIGTERM, self._request)
            _watching.add(self)
        else:
            log.warning("SIGTERM is not watched: the Checkpointer was made outside the main thread")

    @property
    def requested(self) -> bool:
        """Whether the signal has come to this process."""
        return self._requested.is_set()

    @property
    def is_unanswered(self) -> bool:
        """Whether the signal has come, and no hook has ended the loop for it."""
        return self.requested and not self._finished

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._request()

    def _request(self) -> None:
        """On the main thread, or on that of `Wakeup` where the main thread does not come to it; both may."""
        self._requested.set()
        self._start_clock()

    def _start_clock(self) -> None:
        """The deadline holds from here on, whatever the process is at."""
        if not self._ticking.acquire(blocking=False):
            return  # never let go of: there is one deadline
        self._deadline_s = time.monotonic() + self._budget_s
        # A timer, because the loop may never come back to the hook.
        timer = threading.Timer(self._budget_s, self._give_up)
        timer.daemon = True
        timer.start()
        atexit.register(self._bound_teardown)

    def _bound_teardown(self) -> None:
        """At exit: no thread runs while the interpreter takes itself apart, so that the kernel must end it."""
        if _in_main_thread():
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(_TEARDOWN_S, self._deadline_s - time.monotonic()))

    def _give_up(self) -> None:
        if not self._finished:
            log.error("the deadline of %g s after SIGTERM has passed: ending; what is committed stays", self._budget_s)
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

    def linger(self, under_way: Callable[[], list[SaveHandle]], timeout_s: float | None) -> float | None:
        """Wait for the last saves of a loop that has ended, as long as no signal says how long there is.

        What is left of ``timeout_s``, or until the deadline where that comes first.
        """
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.requested and time.monotonic() < until_s and (handles := under_way()):
            with contextlib.suppress(TimeoutError):
                handles[0].exception(_POLL_S)
        if self.requested:
            until_s = min(until_s, time.monotonic() + self.left_s())
        return None if until_s == math.inf else max(0.0, until_s - time.monotonic())

    def close(self) -> None:
        """Put the former handler back.  The deadline of a signal that has come stays."""
        if not _in_main_thread():
            return  # only the main thread may; the handler does no harm
        _watching.discard(self)
        if self._wakeup is not None:
            self._wakeup.close()
            self._wakeup = None
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                signal.signal(signal.SIGTERM, self._former)  # type: ignore[arg-type]

    def in_child(self) -> None:
        """After a fork: the child's signals are its own affair."""
        if self._wakeup is not None:
            self._wakeup.in_child()
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._former)  # type: ignore[arg-type]


_watching: weakref.WeakSet[Stopping] = weakref.WeakSet()
_forking = threading.local()


def _before_fork() -> None:
    """A signal that comes to the child before it has let go of what is the parent's would be taken for the parent's."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if _watching else None


def _after_fork() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    for stopping in list(_watching):
        stopping.in_child()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _fields(handle: SaveHandle) -> dict[str, object]:
    return {"ckptengine": {"step": handle.step, "stage": handle.stage}}
