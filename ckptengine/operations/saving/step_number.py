"""Steps as callers give them."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from ckptengine.errors import UnusableRequest


def step_number(step: SupportsIndex) -> int:
    """The step as a plain number: of an int, a numpy integer, an integer tensor of no dimensions.

    Raises `UnusableRequest` for anything else, truth values and negative numbers included.
    """
    is_truth = str(getattr(step, "dtype", type(step).__name__)).rpartition(".")[2] in ("bool", "bool_")
    if not is_truth and not getattr(step, "ndim", 0):
        try:
            number = operator.index(step)
        except (TypeError, ValueError, RuntimeError):  # torch raises any of them
            number = -1
        if 0 <= number < 1 << 63:
            return number
    raise UnusableRequest(f"step {step!r} is not a whole number from 0 on, below 2**63")
