"""Descriptors of this process, for tests that nothing is left open."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def open_descriptors() -> int:
    """How many there are; other tests' objects may give theirs back at any time."""
    return len(os.listdir("/proc/self/fd"))


def open_under(folder: Path) -> list[str]:
    """What is open of ``folder``, deleted files included."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(path for path in found if path.startswith(f"{folder}/") or path == str(folder))
