"""`ckptengine bench`: what checkpointing costs a training loop, beside other engines, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

HARNESS = ("ckptengine.bench", "bench")
"""The harness as installed, or as it lies in a checkout of the project."""


def main(argv: Sequence[str]) -> int:
    """Run the harness; 0 done, 1 our own engine saved wrong bytes or failed, 2 the request is unusable."""
    for package in HARNESS:
        if importlib.util.find_spec(package) is not None and importlib.util.find_spec(f"{package}.rivals") is not None:
            status: int = importlib.import_module(f"{package}.arguments").main(argv)
            return status
    print(
        "ckptengine bench: the benchmark is not installed; pip install 'ckptengine[bench]', or run it in a checkout",
        file=sys.stderr,
    )
    return 2
