"""What to keep.

Pure: the caller lists what exists and carries out the answer (`ckptengine.operations.retain`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptengine.errors import UnusableRequest


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One committed checkpoint as retention sees it.

    ``committed_s``: wall-clock seconds at the commit, or None where it is not known; only ever compared with that of
    other steps, and never used for order.  ``good``: it is complete and verified on the tier in question; a step that
    is merely believed in does not protect older ones from being needed.
    """

    step: int
    committed_s: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    good: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which checkpoints stay; a checkpoint that any of the reasons names is kept.  With no reason given, all are.

    ``last``: the newest so many good ones.  ``every``: every step that this number divides.  ``best``: the one with
    the smallest or largest value of a metric, ``("loss", "min")``; the newer one of equals.  ``seconds``: one for
    every period of so many seconds, the first of each (hourly checkpoints, say).

    Whatever the reasons, the newest good checkpoint and everything newer than it stays; where none is good, all stay.
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, Literal["min", "max"]] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, count in (("last", self.last), ("every", self.every)):
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise UnusableRequest(f"Keep({name}={count!r}) must be a whole number of at least 1")
        if self.best is not None and (
            not isinstance(self.best, tuple)
            or len(self.best) != 2
            or not isinstance(self.best[0], str)
            or self.best[1] not in ("min", "max")
        ):
            raise UnusableRequest(f'Keep(best={self.best!r}) must be (metric, "min") or (metric, "max")')
        if self.seconds is not None and (
            isinstance(self.seconds, bool)
            or not isinstance(self.seconds, int | float)
            or not (math.isfinite(self.seconds) and self.seconds > 0)
        ):
            raise UnusableRequest(f"Keep(seconds={self.seconds!r}) must be a finite number of seconds above 0")

    @property
    def is_everything(self) -> bool:
        return self.last is None and self.every is None and self.best is None and self.seconds is None

    def select(self, steps: Sequence[StepInfo]) -> set[int]:
        """The steps that stay, from those that exist, given in any order; everything else may be deleted."""
        ordered = sorted(steps, key=lambda info: info.step)
        good = [info for info in ordered if info.good]
        if self.is_everything or not good:
            return {info.step for info in ordered}
        kept = {info.step for info in ordered if info.step >= good[-1].step}
        if self.last is not None:
            kept.update(info.step for info in good[-self.last :])
        if self.every is not None:
            kept.update(info.step for info in good if info.step % self.every == 0)
        if self.best is not None:
            kept.update(_best(good, *self.best))
        if self.seconds is not None:
            kept.update(_spaced(good, self.seconds))
        return kept

    def describe(self) -> str:
        """One line for people."""
        if self.is_everything:
            return "keep everything"
        parts = [f"the last {self.last}"] if self.last is not None else []
        parts += [f"every step divisible by {self.every}"] if self.every is not None else []
        parts += [f"the one with the {self.best[1]}imum {self.best[0]}"] if self.best is not None else []
        parts += [f"one every {self.seconds:g} s"] if self.seconds is not None else []
        return "keep " + ", ".join(parts)


def _best(good: Sequence[StepInfo], metric: str, direction: str) -> set[int]:
    sign = 1.0 if direction == "max" else -1.0
    rated = [
        (sign * float(info.metrics[metric]), info.step)
        for info in good
        if metric in info.metrics and math.isfinite(float(info.metrics[metric]))
    ]
    return {max(rated)[1]} if rated else set()


def _spaced(good: Sequence[StepInfo], seconds: float) -> set[int]:
    kept: set[int] = set()
    since: float | None = None
    for info in good:
        if info.committed_s is None:
            continue
        # A clock that ran backwards starts a new period rather than making everything after it look too young.
        if since is None or info.committed_s - since >= seconds or info.committed_s < since:
            kept.add(info.step)
            since = info.committed_s
    return kept
