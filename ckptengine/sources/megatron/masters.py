"""Whether fp32 copies belong to weights: a sample of them, rounded, must be the weights bit for bit."""

from __future__ import annotations

import numpy as np

from ckptengine.sources.rules.average import bfloat16

SAMPLE = 64
"""How many elements are compared of each piece."""

ROUNDED = ("float32", "bfloat16", "float16")


def rounds_to(masters: bytes, weights: bytes, dtype: str) -> bool:
    """Whether float32 ``masters``, rounded to ``dtype`` (one of `ROUNDED`, else False), are ``weights``."""
    wide = np.frombuffer(masters, "<f4")
    if dtype == "float32":
        return masters == weights
    with np.errstate(all="ignore"):
        if dtype == "float16":
            return wide.astype("<f2").tobytes() == weights
        return dtype == "bfloat16" and bfloat16(wide) == weights
