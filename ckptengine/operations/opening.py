"""Open any checkpoint: every format that this package reads, those that sources alone cannot know included."""

from __future__ import annotations

import os

from ckptengine.sources import detect, native
from ckptengine.sources.port import Format, Source
from ckptengine.universal import detect as universal

FORMATS: tuple[Format, ...] = (
    native.FORMAT,
    universal.FORMAT,
    *(known for known in detect.FORMATS if known.name not in (native.FORMAT.name, universal.FORMAT.name)),
)
"""In the order in which they are tried."""


def open_any(
    path: str | os.PathLike[str], step: int | None = None, rules: str | os.PathLike[str] | None = None
) -> Source:
    """The checkpoint at a path or URL; see `ckptengine.sources.detect.open_source`."""
    return detect.open_source(path, step, rules, formats=FORMATS)
