"""The handle of one save: named stages and a future for each; it never loses an error."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from ckptengine.errors import CheckpointError, UnusableRequest
from ckptengine.snapshot.port import Progress
from ckptengine.snapshot.waiting import Waiting

log = logging.getLogger("ckptengine")

Stage = Literal["capturing", "captured", "committed", "durable", "skipped", "failed"]
_ORDER: dict[str, int] = {"capturing": 0, "captured": 1, "committed": 2, "durable": 3}
_ENDS = ("durable", "skipped", "failed")


class SaveHandle:
    """One checkpoint on its way.  Thread-safe; like `concurrent.futures.Future` where the names are the same.

    Stages in order: ``"capturing"``, ``"captured"`` (live tensors may change), ``"committed"`` (survives a power cut on
    the first storage tier and is visible to restore), ``"durable"`` (same on the last tier); or ``"skipped"`` (the
    overlap policy left it out) or ``"failed"``.  A save that the tiers' intervals do not want on the last tier ends
    where it is meant for: ``"committed"``, or ``"captured"`` where that is host memory, which no power cut spares.
    """

    def __init__(self, step: int, later: Callable[[Callable[[], None]], None] | None = None) -> None:
        """``later(run)`` has the callbacks run elsewhere; None: on the thread that ends the save."""
        self.step = step
        self.counters: dict[str, float] = {}
        self._later = later
        self._guard = threading.RLock()
        self._changed = Waiting()
        self._stage: Stage = "capturing"
        self._furthest = 0
        self._ended = False
        self._error: CheckpointError | None = None
        self._bookkeepers: list[Callable[[SaveHandle], object]] = []
        self._callbacks: list[Callable[[SaveHandle], object]] = []
        self._events: list[dict[str, Any]] = []
        self._progress: Callable[[], Progress] | None = None
        self._carried: Callable[[], tuple[int, int]] | None = None
        self._trouble: CheckpointError | None = None
        self._started_s = time.perf_counter()

    @property
    def stage(self) -> Stage:
        return self._stage

    def done(self) -> bool:
        """Whether nothing more will happen: durable, as far as it is meant to go, skipped or failed."""
        return self._ended or self._stage in _ENDS

    def wait(self, stage: str = "durable", timeout_s: float | None = None) -> bool:
        """Block until ``stage`` is reached.  False when the time ran out; raises the save's error when it failed.

        A skipped save never reaches a stage, and one that is not wanted on the last tier never becomes durable: waiting
        for that returns False as soon as it is known.  What has been committed stays so if a later hop fails.
        """
        if stage not in _ORDER:
            raise UnusableRequest(f"no stage {stage!r}; stages are {', '.join(_ORDER)}")
        self._changed.wait_for(lambda: self._reached(stage) or self.done(), timeout_s)
        with self._guard:  # not before the bookkeepers have heard of an end
            if self._error is not None and not (self._reached(stage) and self._furthest >= _ORDER["committed"]):
                raise self._error
            return self._reached(stage)

    def result(self, timeout_s: float | None = None) -> int:
        """The step, once durable or as far as it is meant to go.  Raises the save's error, or TimeoutError."""
        if not self.wait("durable", timeout_s) and not self.done():
            raise TimeoutError(f"save of step {self.step} is {self._stage} after {timeout_s} s")
        return self.step

    def exception(self, timeout_s: float | None = None) -> CheckpointError | None:
        """The save's error, None when it ended without one.  TimeoutError when it has not ended in time."""
        if not self._changed.wait_for(self.done, timeout_s):
            raise TimeoutError(f"save of step {self.step} is {self._stage} after {timeout_s} s")
        with self._guard:  # not before the bookkeepers have heard of it
            return self._error

    def add_done_callback(self, callback: Callable[[SaveHandle], object]) -> None:
        """Call ``callback(handle)`` when the save ends; at once, on this thread, if it has.

        As with `concurrent.futures.Future`: callbacks run one after the other in the order in which they were added,
        with no lock held, when those who wait for the save may already have gone on; an exception in one, of whatever
        kind, is logged and spoils nothing.  They have a background thread of their own, where they hold up nothing but
        later callbacks: they may save, wait, restore or close.
        """
        with self._guard:
            if not self.done():
                self._callbacks.append(callback)
                return
        self._call([callback])

    @property
    def trouble(self) -> CheckpointError | None:
        """What went wrong when the step was last carried on, while another try is to follow; None once it has ended."""
        return None if self.done() else self._trouble

    @property
    def progress(self) -> dict[str, float]:
        """Exact counters so far: bytes captured, written, copied, total, in-flight peak; seconds and milliseconds of
        what has happened (``blocked_ms``, ``fence_ms``, ``captured_s``, ``committed_s``, ``durable_s``).

        On its way to the next tier also ``arrived_bytes`` of ``carried_bytes`` of this rank; ``retries`` where a try
        has failed."""
        # Either goes when the save ends, at any time.
        counters, progress, carried = dict(self.counters), self._progress, self._carried
        if carried is not None:
            arrived_bytes, carried_bytes = carried()
            if carried_bytes:
                counters.update(arrived_bytes=arrived_bytes, carried_bytes=carried_bytes)
        if progress is not None:
            now = progress()
            counters.update(
                captured_bytes=now.captured_bytes,
                written_bytes=now.written_bytes,
                copied_bytes=now.copied_bytes,
                total_bytes=now.total_bytes,
                peak_bytes=now.peak_bytes,
            )
        return counters

    def trace(self) -> dict[str, Any]:
        """The save as a Chrome trace (open it in Perfetto): ``{"traceEvents": [...]}``, times in microseconds."""
        return {"traceEvents": [{"pid": self.step, "cat": "save", **event} for event in self._events]}

    # ---- for the engine

    def on_done(self, bookkeeper: Callable[[SaveHandle], object]) -> None:
        """Have ``bookkeeper(handle)`` run before anybody hears that the save has ended; it waits for nothing."""
        with self._guard:
            if not self.done():
                self._bookkeepers.append(bookkeeper)
                return
        self._call([bookkeeper])

    def track(self, progress: Callable[[], Progress]) -> None:
        self._progress = progress

    def follow(self, carried: Callable[[], tuple[int, int]]) -> None:
        """``carried`` says how far the step has come to the next tier: bytes that have arrived there, and in all."""
        self._carried = carried

    def tried(self, error: CheckpointError) -> None:
        """A try to carry the step on has failed; another one follows."""
        self._trouble = error
        self.counters["retries"] = self.counters.get("retries", 0.0) + 1

    def event(self, name: str, started_s: float, ended_s: float | None = None, thread: str = "save") -> None:
        """Add a span of the performance counter to the trace."""
        ended_s = time.perf_counter() if ended_s is None else ended_s
        self._events.append(
            {"ph": "X", "name": name, "ts": started_s * 1e6, "dur": (ended_s - started_s) * 1e6, "tid": thread}
        )

    def extend_trace(self, events: list[dict[str, Any]]) -> None:
        self._events.extend(events)

    def add_ms(self, counter: str, milliseconds: float) -> None:
        self.counters[counter] = self.counters.get(counter, 0.0) + milliseconds

    def advance(self, stage: Stage) -> None:
        """Enter ``stage``; entering an earlier one, or leaving an end, changes nothing."""
        with self._guard:
            if self.done() or _ORDER.get(stage, 9) <= _ORDER[self._stage]:
                return
            self._stage = stage
            self._furthest = max(self._furthest, _ORDER.get(stage, 0))
            self.counters.setdefault(f"{stage}_s", time.perf_counter() - self._started_s)
            callbacks = self._finish()
        self._hand_over(callbacks)

    def end(self) -> None:
        """It has come as far as it is meant to."""
        with self._guard:
            if self.done():
                return
            self._ended = True
            callbacks = self._finish()
        self._hand_over(callbacks)

    def fail(self, error: CheckpointError) -> None:
        """End with ``error`` unless already ended."""
        with self._guard:
            if self.done():
                return
            self._stage, self._error = "failed", error
            callbacks = self._finish()
        self._hand_over(callbacks)

    def _reached(self, stage: str) -> bool:
        return self._stage != "skipped" and self._furthest >= _ORDER[stage]

    def _finish(self) -> list[Callable[[SaveHandle], object]]:
        """With the lock held: let those who wait go on; what is to be called once the lock is free."""
        self._changed.notify_all()
        if not self.done():
            return []
        if self._progress is not None:
            self.counters.update(self.progress)
            self._progress = None
        self._carried = None
        bookkeepers, self._bookkeepers = self._bookkeepers, []
        self._call(bookkeepers)
        callbacks, self._callbacks = self._callbacks, []
        return callbacks

    def _hand_over(self, callbacks: list[Callable[[SaveHandle], object]]) -> None:
        if self._later is None:
            self._call(callbacks)
        elif callbacks:
            self._later(partial(self._call, callbacks))

    def _call(self, callbacks: list[Callable[[SaveHandle], object]]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except BaseException as error:
                # The caller's callback must neither turn a good save into a failed one nor end a thread of the engine,
                # as sys.exit would; on the main thread an exit or a Ctrl-C is what the process waits for.
                if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                    raise
                log.exception("a done callback of the save of step %d raised", self.step)

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self._stage}>"
