"""What a path is that ought to be a root: a root, or something that is better named otherwise."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from ckptengine.errors import CheckpointError, NotFound, UnusableRequest
from ckptengine.store import names

_WITH_STEP = re.compile(r"(.+)@(\d+|latest)\Z", re.DOTALL)


def require_root(path: str, command: str) -> None:
    """Raise where the local ``path`` cannot be the root that ``command`` takes, and say what to type instead.

    An empty directory passes: a job may have just begun there.  Raises `NotFound` or `UnusableRequest`.
    """
    place = Path(path)
    with_step = _WITH_STEP.match(path)
    if with_step and not place.exists() and Path(with_step[1]).is_dir():
        raise UnusableRequest(f"{path}: this takes a whole root: ckptengine {command} {with_step[1]}")
    if not place.exists():
        raise NotFound(f"there is no directory {path}")
    if not place.is_dir():
        raise UnusableRequest(f"{path} is a file and no root: ckptengine show {path} tells what is in it")
    entries = [entry.name for entry in place.iterdir()]
    if any(entry == names.ATTEMPTS or names.STEP_PATTERN.match(entry) for entry in entries):
        return
    if names.is_step(place.name, entries):
        raise UnusableRequest(
            f"{path} is one step of the root {place.parent}: ckptengine {command} {place.parent}, or ckptengine show "
            f"{place.parent}@{int(place.name.removeprefix('step-'))}"
        )
    kind = _format_of(path) if entries else None
    if kind is not None:
        raise UnusableRequest(
            f"{path} is a {kind} checkpoint and no root of steps: ckptengine show {path} tells what is in it"
        )


def _format_of(path: str) -> str | None:
    """The format of a checkpoint at ``path``; None where there is none that can be read."""
    opening = importlib.import_module("ckptengine.operations.opening")  # loads every format: only where it must
    try:
        source = opening.open_any(path)
    except CheckpointError:
        return None
    kind = str(source.format)
    source.files.close()
    return kind
