"""`ckptengine bench`: what checkpointing costs a training loop, beside other engines, on this machine."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

HARNESS = ("ckptengine_bench.bench", "bench")
"""The harness as installed, or as it lies in a checkout of the project."""


def main(argv: Sequence[str]) -> int:
    """Run the harness; 0 done, 1 our own engine saved wrong bytes or failed, 2 the request is unusable."""
    for package in HARNESS:
        if _is_installed(f"{package}.rivals"):
            status: int = importlib.import_module(f"{package}.arguments").main(argv)
            return status
    print(
        "ckptengine bench: the benchmark is not installed; pip install 'ckptengine[bench]', or run it in a checkout",
        file=sys.stderr,
    )
    return 2


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
