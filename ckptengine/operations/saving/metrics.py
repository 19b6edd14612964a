"""Metrics of a save, read as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptengine.errors import UnsupportedValue


def metrics_of(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Name -> number; tensors and numpy scalars of one element are read (which waits for their device)."""
    found: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        one = hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1
        number = value.item() if one else value
        if not isinstance(name, str) or isinstance(number, complex) or not isinstance(number, (int, float)):
            shape = getattr(value, "shape", None)
            kind = type(value).__name__ + (f" of shape {tuple(shape)}" if shape else "")
            raise UnsupportedValue(f"metrics[{name!r}] is {kind}; a metric is a number under a text name")
        finite = number == number and abs(number) != float("inf")
        found[name] = number if finite else str(number)  # type: ignore[assignment]
    return found
