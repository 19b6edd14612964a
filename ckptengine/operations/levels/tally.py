"""What a checkpointer's saves have come to so far, in numbers, for whoever looks: metrics, scalars, listings."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptengine.errors import CheckpointError
from ckptengine.operations.saving.handle import SaveHandle

log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One tier: its newest step since the start, and the steps that are on their way to it."""

    label: str
    newest_step: int | None
    newest_age_s: float | None
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Totals since the checkpointer was made.

    ``ended``: saves by how they ended (``durable``, ``committed``, ``captured``, ``skipped``, ``failed``).
    ``failures``: saves that failed, and steps of an earlier job that could not be carried on.  ``retries``: tries to
    carry a step on that failed and were followed by another.  ``blocked_s``: training time that `save` and fences took.
    ``in_flight``: saves that have not ended.
    ``durable_age_s``: since the newest durable save, or since the start where there is none.
    """

    ended: dict[str, int]
    failures: int
    retries: int
    last_error: str | None
    blocked_s: float
    written_bytes: int
    in_flight: int
    durable_step: int | None
    durable_age_s: float
    tiers: tuple[TierStatus, ...] = ()


@dataclass(slots=True)
class _Newest:
    step: int
    at_s: float


@dataclass(slots=True)
class Tally:
    """Counts saves as they end.  Thread-safe."""

    labels: list[str]
    pending: Callable[[], dict[str, tuple[int, ...]]]
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _began_s: float = field(default_factory=time.monotonic)
    _ended: Counter[str] = field(default_factory=Counter)
    _started: int = 0
    _blocked_s: float = 0.0
    _written_bytes: int = 0
    _retries: int = 0
    _left_failed: int = 0
    _last_error: str | None = None
    _newest: dict[str, _Newest] = field(default_factory=dict)
    _durable: _Newest | None = None
    _calls: list[Callable[[SaveHandle], object]] = field(default_factory=list)

    def started(self, handle: SaveHandle) -> None:
        """A save has begun."""
        with self._guard:
            self._started += 1
        handle.on_done(self._count)
        handle.add_done_callback(self._tell)

    def arrived(self, number: int, step: int) -> None:
        """A step is on tier ``number``."""
        with self._guard:
            self._newest[self.labels[number]] = newest = _Newest(step, time.monotonic())
            if number == len(self.labels) - 1:
                self._durable = newest

    def tried(self, error: CheckpointError) -> None:
        """A try to carry a step on has failed; another one follows."""
        with self._guard:
            self._retries += 1
            self._last_error = f"{error.code}: {error}"

    def failed(self, error: CheckpointError) -> None:
        """A step of an earlier job could not be carried on."""
        with self._guard:
            self._left_failed += 1
            self._last_error = f"{error.code}: {error}"

    def on_end(self, call: Callable[[SaveHandle], object]) -> None:
        """Have ``call(handle)`` run on a background thread when a save ends."""
        self._calls.append(call)

    def _count(self, handle: SaveHandle) -> None:
        error = handle.exception(0)
        took = handle.counters
        with self._guard:
            self._ended[handle.stage] += 1
            self._blocked_s += (took.get("blocked_ms", 0.0) + took.get("fence_ms", 0.0)) / 1e3
            self._written_bytes += int(took.get("written_bytes", 0))
            if error is not None:
                self._last_error = f"{error.code}: {error}"
            if handle.stage == "durable":
                self._durable = _Newest(handle.step, time.monotonic())

    def _tell(self, handle: SaveHandle) -> None:
        for call in self._calls:
            try:
                call(handle)
            except Exception:
                # Whoever watches must not turn a good save into a failed one.
                log.exception("an observer of the save of step %d raised", handle.step)

    def status(self) -> Status:
        """Where things stand now."""
        now_s, waiting = time.monotonic(), self.pending()
        with self._guard:
            tiers = []
            for label in self.labels:
                newest = self._newest.get(label)
                tiers.append(
                    TierStatus(
                        label=label,
                        newest_step=None if newest is None else newest.step,
                        newest_age_s=None if newest is None else now_s - newest.at_s,
                        pending=len(waiting.get(label, ())),
                    )
                )
            durable = self._durable
            return Status(
                ended=dict(self._ended),
                failures=self._ended["failed"] + self._left_failed,
                retries=self._retries,
                last_error=self._last_error,
                blocked_s=self._blocked_s,
                written_bytes=self._written_bytes,
                in_flight=self._started - sum(self._ended.values()),
                durable_step=None if durable is None else durable.step,
                durable_age_s=now_s - (self._began_s if durable is None else durable.at_s),
                tiers=tuple(tiers),
            )
