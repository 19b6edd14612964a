"""Every engine that is measured, each in a module of its own that is imported only in the process that runs it."""

from __future__ import annotations

import importlib

from ckptengine.errors import UnusableRequest

from ..engine import Engine
from ..names import ENGINES


def engine_class(name: str) -> type[Engine]:
    """The class of an engine; raises `Unavailable` where its packages are missing."""
    if name not in ENGINES:
        raise UnusableRequest(f"no such engine: {name}; there are {', '.join(ENGINES)}")
    module, attribute = ENGINES[name]
    found: type[Engine] = getattr(importlib.import_module(f".{module}", __name__), attribute)
    return found
