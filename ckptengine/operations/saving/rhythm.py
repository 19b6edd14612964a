"""When the training-loop hook saves.  With several ranks and a clock in play, rank 0 decides for the coming call."""

from __future__ import annotations

import time

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.policy.cost import CostHistory, SaveCost
from ckptengine.policy.interval import Interval, LastSave


class Rhythm:
    """Asks the interval policy once per hook call; the answer is the same on every rank."""

    def __init__(self, interval: Interval | None, port: Coordinator, timeout_s: float) -> None:
        self._interval, self._port, self._timeout_s = interval, port, timeout_s
        self._costs = CostHistory()
        self._last: LastSave | None = None
        self._calls = 0

    def due(self, step: int) -> bool:
        """Whether to save at ``step``."""
        if self._interval is None:
            return False
        if self._port.world == 1 or not self._interval.needs_clock:
            return self._ask(step)
        self._calls += 1
        decided = False
        if self._calls > 1:
            decided = bool(receive(self._port, f"due/{self._calls}", self._timeout_s))
            if self._port.rank == 0:
                # Every rank has read the one before by the time that rank 0 needs the next but one.
                self._port.delete(f"due/{self._calls - 2}")
        if self._port.rank == 0:
            publish(self._port, f"due/{self._calls + 1}", self._ask(step + 1, decided_step=step if decided else None))
        return decided

    def _ask(self, step: int, decided_step: int | None = None) -> bool:
        assert self._interval is not None
        if decided_step is not None:
            self.saved(decided_step)
        return self._interval.due(step, time.monotonic(), self._last, self._costs.estimate())

    def saved(self, step: int) -> None:
        """A save of ``step`` was started."""
        self._last = LastSave(step, time.monotonic())

    def ended(self, handle: SaveHandle) -> None:
        """A save has ended: what it took, for policies that follow it."""
        took = handle.counters
        safe_s = took.get("durable_s", took.get("committed_s", took.get("captured_s")))
        if handle.exception(0) is None and handle.stage != "skipped" and safe_s is not None:
            stolen_s = (took.get("blocked_ms", 0.0) + took.get("fence_ms", 0.0)) / 1e3
            self._costs = self._costs.add(stolen_s, safe_s)

    def cost(self) -> SaveCost | None:
        """What a save has cost so far."""
        return self._costs.estimate()

    def describe(self) -> str:
        """One line: the interval, and what it comes to by what saves have cost so far."""
        return "only explicit saves" if self._interval is None else self._interval.describe(self._costs.estimate())
