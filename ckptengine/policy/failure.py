"""What a failed save or drain does to the training loop.

Pure: the caller says what happened, the policy says what to do next.  Whatever the answer is, the failure stays visible
on the handle, in the log and in the metrics; a policy only decides whether training hears of it as an exception.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ckptengine.errors import UnusableRequest


@dataclass(frozen=True, slots=True)
class Trouble:
    """Where things stand when a save or drain has failed, or when the hook looks whether it is time to give up.

    ``attempts``: times this save or drain has been tried (0 at the hook).  ``age_steps`` and ``age_s``: how far the
    newest durable checkpoint, or the start of the run where there is none, lies behind the current step and time.
    ``can_retry``: the bytes are still there to be sent again (a drain; never a capture whose tensors have moved on).
    """

    attempts: int
    age_steps: int
    age_s: float
    can_retry: bool = True


@dataclass(frozen=True, slots=True)
class Raise:
    """Raise at the next hook; ``why`` is the reason in words."""

    why: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after ``after_s`` seconds; training goes on."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GoOn:
    """Give this one up and go on; a later save is the next chance."""


Decision = Raise | Retry | GoOn


@dataclass(frozen=True, slots=True)
class RaiseAtOnce:
    """``on_failure="raise"``: the first failure is raised at the next hook."""

    def decide(self, trouble: Trouble) -> Decision:
        """Raise, if anything has failed."""
        return Raise("on_failure is 'raise'") if trouble.attempts > 0 else GoOn()

    def describe(self) -> str:
        return "raise at the next hook"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerate:
    """Go on after a failure, retry with back-off, and raise only when the newest durable checkpoint is too old.

    ``max_age_steps`` and ``max_age_s``: the age beyond which it is raised after all; None is no bound.  ``retries``:
    how often one save or drain is tried again; ``backoff_s``: the wait before the first retry, doubled for each
    further one up to ``max_backoff_s``.  With neither age given it is never raised.
    """

    max_age_steps: int | None = None
    max_age_s: float | None = None
    retries: int = 3
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    def __post_init__(self) -> None:
        steps = self.max_age_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise UnusableRequest(f"Tolerate(max_age_steps={steps!r}) must be a whole number of at least 1")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise UnusableRequest(f"Tolerate(retries={self.retries!r}) must be a whole number of at least 0")
        if self.max_age_s is not None and not (math.isfinite(self.max_age_s) and self.max_age_s > 0):
            raise UnusableRequest(f"Tolerate(max_age_s={self.max_age_s!r}) must be a finite number of seconds above 0")
        if not (math.isfinite(self.max_backoff_s) and 0 <= self.backoff_s <= self.max_backoff_s):
            raise UnusableRequest(
                f"Tolerate(backoff_s={self.backoff_s!r}) must lie between 0 and max_backoff_s={self.max_backoff_s!r}"
            )

    def wait_s(self, attempts: int) -> float:
        """Seconds to wait after the ``attempts``-th try has failed."""
        doublings = min(max(attempts - 1, 0), 64)
        return min(self.backoff_s * 2.0**doublings, self.max_backoff_s)

    def decide(self, trouble: Trouble) -> Decision:
        """Raise when too old, else retry while retries are left, else go on."""
        if self.max_age_steps is not None and trouble.age_steps > self.max_age_steps:
            return Raise(
                f"the newest durable checkpoint is {trouble.age_steps} steps old, "
                f"more than the {self.max_age_steps} that are tolerated"
            )
        if self.max_age_s is not None and trouble.age_s > self.max_age_s:
            return Raise(
                f"the newest durable checkpoint is {trouble.age_s:.0f} s old, "
                f"more than the {self.max_age_s:g} s that are tolerated"
            )
        if trouble.can_retry and 0 < trouble.attempts <= self.retries:
            return Retry(self.wait_s(trouble.attempts))
        return GoOn()

    def describe(self) -> str:
        bounds = [f"{self.max_age_steps} steps"] if self.max_age_steps is not None else []
        bounds += [f"{self.max_age_s:g} s"] if self.max_age_s is not None else []
        limit = f"raise when nothing durable is younger than {' or '.join(bounds)}" if bounds else "never raise"
        return f"retry {self.retries} times, then go on; {limit}"


FailurePolicy = RaiseAtOnce | Tolerate


def failure_policy(on_failure: Literal["raise"] | FailurePolicy) -> FailurePolicy:
    """The policy that ``on_failure`` names."""
    if isinstance(on_failure, RaiseAtOnce | Tolerate):
        return on_failure
    if on_failure == "raise":
        return RaiseAtOnce()
    raise UnusableRequest(f'on_failure={on_failure!r} is neither "raise" nor ckptengine.Tolerate(...)')
