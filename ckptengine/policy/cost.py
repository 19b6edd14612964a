"""What a save costs, estimated from the saves that were measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

WINDOW = 16
"""Newest saves that an estimate looks at: enough to shrug off an outlier, few enough to follow a change."""


@dataclass(frozen=True, slots=True)
class SaveCost:
    """The cost of one save on one tier.

    ``stolen_s``: seconds of training time that a save takes (blocked, and steps slowed down, together).
    ``durable_s``: seconds from its start until it was safe on the tier.  ``samples``: saves behind the estimate.
    """

    stolen_s: float
    durable_s: float
    samples: int = 1


@dataclass(frozen=True, slots=True)
class CostHistory:
    """The newest measured saves of one tier, oldest first; immutable, grown by `add`."""

    stolen_s: tuple[float, ...] = ()
    durable_s: tuple[float, ...] = ()

    def add(self, stolen_s: float, durable_s: float) -> CostHistory:
        """The history with one more save; one that a jumping clock spoilt (negative, not finite) is left out."""
        if not (math.isfinite(stolen_s) and math.isfinite(durable_s)) or stolen_s < 0 or durable_s < 0:
            return self
        return CostHistory((*self.stolen_s, stolen_s)[-WINDOW:], (*self.durable_s, durable_s)[-WINDOW:])

    def estimate(self) -> SaveCost | None:
        """Medians over the window, or None before the first save."""
        if not self.stolen_s:
            return None
        return SaveCost(statistics.median(self.stolen_s), statistics.median(self.durable_s), len(self.stolen_s))
