"""What a job's policies come to, left beside its checkpoints for ``show --policy`` and ``ls``.

A hidden file that is replaced now and then; nothing depends on it, and nothing of a checkpoint is in it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptengine.errors import NotFound, StorageFailed, UnreadableFormat

log = logging.getLogger("ckptengine")

NAME = ".policy.json"
FORMAT = 1
_LIMIT_BYTES = 1 << 20
_PAUSE_S = 1.0


class PolicyRecord:
    """Writes what ``describe()`` says to a directory, at most once a second.  Called on background threads."""

    def __init__(self, directory: Path, describe: Callable[[], dict[str, Any]]) -> None:
        self._path, self._describe = directory / NAME, describe
        self._guard = threading.Lock()
        self._written_s = float("-inf")

    def __call__(self, ended: object) -> None:
        """A save has ended.  A place that cannot be written to is no failure of the save."""
        del ended
        with self._guard:
            if time.monotonic() - self._written_s < _PAUSE_S:
                return
            self._written_s = time.monotonic()
            fresh = self._path.with_name(f"{NAME}.tmp")  # one name: what a killed job left is written over
            try:
                fresh.write_text(json.dumps({"format": FORMAT, **self._describe()}) + "\n")
                os.replace(fresh, self._path)
            except OSError as refusal:
                with contextlib.suppress(OSError):
                    fresh.unlink(missing_ok=True)
                log.info("%s could not be written, so that `show --policy` knows less: %s", self._path, refusal)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed job left of writing its record, of whatever version; the caller holds the place's lock."""
    for left in directory.glob(f"{NAME}*.tmp"):
        try:
            left.unlink(missing_ok=True)
        except OSError as refusal:
            raise StorageFailed(f"cannot remove {left}: {refusal.strerror or refusal}") from refusal


def read_policy(directory: Path) -> dict[str, Any]:
    """What the newest job there has recorded.  Raises `NotFound` or `UnreadableFormat`."""
    path = directory / NAME
    try:
        text = path.read_bytes()[:_LIMIT_BYTES]
        document = json.loads(text)
    except FileNotFoundError:
        raise NotFound(
            f"no job has recorded its policies in {directory}; one with an interval or tiers does with its first save"
        ) from None
    except OSError as refusal:
        raise StorageFailed(f"cannot read {path}: {refusal.strerror or refusal}") from refusal
    except ValueError:
        raise UnreadableFormat(f"{path} is no record of policies; remove it, the next save writes it anew") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UnreadableFormat(f"{path} was written by another version; the next save replaces it")
    return document
