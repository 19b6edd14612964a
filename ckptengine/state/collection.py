"""The cyclic garbage collector, kept away from work on very many objects."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[Callable[[], None]]:
    """Keep the cyclic garbage collector from running: it would scan a large walk's objects over and over.

    What it gives ends that early.
    """
    if not gc.isenabled():
        yield lambda: None
        return
    gc.disable()
    try:
        yield gc.enable
    finally:
        gc.enable()
