"""When to save.

Pure decisions: no clock is read here, every time is an argument.  Times are seconds of one monotonic clock of the
caller's choice; a difference that comes out negative (a clock that jumped) counts as zero.  Under several ranks one
rank asks `due` for a coming step and the others follow its answer: `Interval.needs_clock` says whether that is needed
at all (an interval in steps gives every rank the same answer by itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ckptengine.errors import UnusableRequest
from ckptengine.policy.cost import SaveCost


@dataclass(frozen=True, slots=True)
class LastSave:
    """The newest save that was started (or skipped on purpose), or where the run began when there was none.

    ``at_s`` is when, on the same clock as ``now_s``.
    """

    step: int
    at_s: float


class Interval(Protocol):
    """When a save is due on one tier."""

    @property
    def needs_clock(self) -> bool:
        """Whether the answer depends on time, so that one rank must decide for all."""
        ...

    def due(self, step: int, now_s: float, last: LastSave | None, cost: SaveCost | None = None) -> bool:
        """Whether to save at ``step``.  Never true twice for one step."""
        ...

    def describe(self, cost: SaveCost | None = None) -> str:
        """One line for people: the rule, and what it comes to now."""
        ...


@dataclass(frozen=True, slots=True)
class Every:
    """Save every so many steps, every so many seconds, or at whichever of the two comes first.

    Steps are counted on the absolute grid (50, 100, 150, ...), so that a resumed run saves at the steps at which the
    run that was never stopped does.  A loop that jumps over a grid point saves at the first step after it.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise UnusableRequest("Every() says no interval; give steps=, seconds= or both")
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, int)):
            raise UnusableRequest(f"Every(steps={self.steps!r}) must be a whole number")
        if self.steps is not None and self.steps < 1:
            raise UnusableRequest(f"Every(steps={self.steps}) must be at least 1")
        if self.seconds is not None:
            positive_s("Every(seconds=...)", self.seconds)

    @property
    def needs_clock(self) -> bool:
        return self.seconds is not None

    def due(self, step: int, now_s: float, last: LastSave | None, cost: SaveCost | None = None) -> bool:
        """Whether a grid point or the time was reached since ``last``; with no ``last`` the time counts as reached."""
        del cost
        if last is not None and step <= last.step:
            return False
        if self.steps is not None and (
            step % self.steps == 0 or (last is not None and step // self.steps > last.step // self.steps)
        ):
            return True
        return self.seconds is not None and (last is None or now_s - last.at_s >= self.seconds)

    def describe(self, cost: SaveCost | None = None) -> str:
        del cost
        parts = [f"{self.steps} steps"] if self.steps is not None else []
        parts += [f"{self.seconds:g} s"] if self.seconds is not None else []
        return "every " + " or ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoInterval:
    """Save as often as is worth it, from what a save costs and how often the job fails.

    The interval is Young's ``T = sqrt(2 * cost * MTBF)``: the cost of saving, ``cost / T`` of the time, plus the work
    lost at a failure, ``T / 2`` every ``MTBF``, is least there.  It is then raised, where needed, to

    - ``cost / max_overhead``, so that saving never takes more than that share of the training time;
    - the time one save takes to be safe on the tier, as a denser stream of saves could not keep up;
    - ``min_s``; and cut at ``max_s``, unless that would break the bound on overhead.

    ``mtbf_s``: mean time between failures of the whole job, in seconds (nodes fail independently: one node's figure
    divided by the number of nodes).  ``assumed_cost_s`` stands for the cost until a save has been measured.
    """

    mtbf_s: float = 6 * 3600.0
    max_overhead: float = 0.01
    min_s: float = 1.0
    max_s: float = 4 * 3600.0
    assumed_cost_s: float = 0.05

    def __post_init__(self) -> None:
        positive_s("AutoInterval(mtbf_s=...)", self.mtbf_s)
        positive_s("AutoInterval(max_s=...)", self.max_s)
        positive_s("AutoInterval(assumed_cost_s=...)", self.assumed_cost_s)
        if not (math.isfinite(self.min_s) and 0 <= self.min_s <= self.max_s):
            raise UnusableRequest(f"AutoInterval(min_s={self.min_s}) must lie between 0 and max_s={self.max_s}")
        if not 0 < self.max_overhead <= 1:
            raise UnusableRequest(f"AutoInterval(max_overhead={self.max_overhead}) is a share of the time, in (0, 1]")

    @property
    def needs_clock(self) -> bool:
        return True

    def period_s(self, cost: SaveCost | None) -> float:
        """Seconds between two saves that ``cost`` calls for."""
        stolen_s = self.assumed_cost_s if cost is None else cost.stolen_s
        durable_s = 0.0 if cost is None else cost.durable_s
        wanted_s = min(max(math.sqrt(2.0 * stolen_s * self.mtbf_s), self.min_s), self.max_s)
        return max(wanted_s, stolen_s / self.max_overhead, durable_s)

    def due(self, step: int, now_s: float, last: LastSave | None, cost: SaveCost | None = None) -> bool:
        """Whether the period has passed since ``last``; with no ``last`` it counts as passed."""
        if last is None:
            return True
        return step > last.step and now_s - last.at_s >= self.period_s(cost)

    def describe(self, cost: SaveCost | None = None) -> str:
        known = "assumed" if cost is None else f"median of {cost.samples} saves"
        stolen_s = self.assumed_cost_s if cost is None else cost.stolen_s
        return (
            f"every {self.period_s(cost):.3g} s (automatic: cost {stolen_s * 1e3:.3g} ms, {known}; "
            f"MTBF {self.mtbf_s:g} s; overhead at most {self.max_overhead:.3%})"
        )


@dataclass(frozen=True, slots=True)
class Soonest:
    """Due when any of several intervals is: when something must be saved because one tier or another wants it."""

    intervals: tuple[Interval, ...]

    @property
    def needs_clock(self) -> bool:
        return any(interval.needs_clock for interval in self.intervals)

    def due(self, step: int, now_s: float, last: LastSave | None, cost: SaveCost | None = None) -> bool:
        """Whether any of them is due."""
        return any(interval.due(step, now_s, last, cost) for interval in self.intervals)

    def describe(self, cost: SaveCost | None = None) -> str:
        return "; ".join(dict.fromkeys(interval.describe(cost) for interval in self.intervals))


def positive_s(what: str, value: float) -> None:
    """Refuse anything that is not a finite number of seconds above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UnusableRequest(f"{what} is {value!r}; it must be a finite number of seconds above 0")
