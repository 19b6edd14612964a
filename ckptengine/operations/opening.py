"""Open any checkpoint: every format that this package reads, those that sources alone cannot know included."""

from __future__ import annotations

import logging
import os

from ckptengine.errors import CheckpointError, NotFound, UnreadableFormat
from ckptengine.sources import detect, native
from ckptengine.sources.port import Format, Source
from ckptengine.universal import detect as universal

log = logging.getLogger("ckptengine")

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


def tell_of_foreign(root: str | os.PathLike[str]) -> None:
    """Say in the log where a root without a checkpoint of ours holds another's: its job would begin anew unawares."""
    try:
        source = open_any(root)
        told = f"is of format {source.format}"
        source.files.close()
    except (NotFound, UnreadableFormat):
        return
    except CheckpointError as error:
        told = f"does not open ({error})"
    log.warning(
        "%s has no checkpoint that this engine wrote, so nothing is restored; the one that lies there %s: give it as "
        "start_from to go on from it",
        root,
        told,
    )
