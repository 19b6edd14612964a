"""Errors on their way from one rank to the others: what they are called and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptengine.errors import CheckpointError, SaveFailed


def error_note(error: BaseException, rank: int) -> dict[str, Any]:
    """What the other ranks are told of an error of ``rank``, as JSON."""
    if isinstance(error, CheckpointError):
        return {"error": f"rank {rank}: {error}", "code": error.code}
    return {"error": f"rank {rank}: {type(error).__name__}: {error}", "code": SaveFailed.code}


def error_of(note: dict[str, Any]) -> CheckpointError:
    """The error of a note: of the class that has its code."""
    kind = next((one for one in _tree(CheckpointError) if one.code == note.get("code")), SaveFailed)
    return kind(note["error"])


def _tree(kind: type[CheckpointError]) -> Iterator[type[CheckpointError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _tree(below)
