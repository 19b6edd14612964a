"""Parts of the command line that need an extra."""

from __future__ import annotations

import importlib
from typing import Any

from ckptengine.errors import UnusableRequest


def optional_module(name: str, extra: str = "all") -> Any:
    """Import a module of ours that needs an extra; `UnusableRequest` naming the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnusableRequest(f"this needs {error.name}: pip install 'ckptengine[{extra}]'") from None
