"""What lies beneath a root, step by step, for people: which checkpoints exist, which do not, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import Manifest
from ckptengine.store.root import Root

StepState = Literal["committed", "incomplete", "damaged", "abandoned"]


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One line of ``ls``.  ``nbytes`` counts the rank files; ``reason`` says why it is not simply committed."""

    step: int
    state: StepState
    nbytes: int
    attempt: int = 0
    save: int = 0
    world: int = 0
    tensors: int = 0
    created: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def list_steps(root: Root) -> list[StepEntry]:
    """Every step directory beneath ``root``, oldest first.  Looks at manifests and file sizes, not at tensor bytes."""
    line = root.history.line()
    newest: dict[int, CommitRef] = {}
    for commit in root.history.commits():
        newest[commit.step] = commit
    entries = []
    for step in _steps(root):
        ref = line.get(step)
        if ref is not None:
            entries.append(_entry(root, ref, "committed"))
        elif step in newest:
            reason = "belongs to a line of history that a restore to an older step or a newer attempt left behind"
            entries.append(_entry(root, newest[step], "abandoned", reason))
        else:
            nbytes = _directory_bytes(root, step)
            entries.append(StepEntry(step, "incomplete", nbytes, reason="no manifest: the save never committed"))
    return entries


def _steps(root: Root) -> list[int]:
    try:
        entries = os.listdir(root.path)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise UnreadableFormat(f"{root.path} is a file; name the directory of a run") from None
    except OSError as error:
        raise UnreadableFormat(f"cannot list {root.path}: {error.strerror}") from None
    matches = (names.STEP_PATTERN.match(entry) for entry in entries)
    return sorted(int(match[1]) for match in matches if match)


def _entry(root: Root, ref: CommitRef, state: StepState, reason: str = "") -> StepEntry:
    def size_of(name: str) -> int | None:
        path = root.step_path(ref.step) / name
        return path.stat().st_size if path.exists() else None

    lying = partial(_directory_bytes, root, ref.step)
    return entry_of(ref, state, partial(root.manifest, ref), size_of, lying, reason)


def entry_of(
    ref: CommitRef,
    state: StepState,
    read: Callable[[], Manifest],
    size_of: Callable[[str], int | None],
    lying_bytes: Callable[[], int],
    reason: str,
) -> StepEntry:
    """The entry of a commit: damaged where ``read`` finds no manifest, or files are not of the size it records.

    ``size_of`` gives the size of a rank file, None where there is none; ``lying_bytes`` counts what is there.
    """
    try:
        manifest = read()
        for rank, record in enumerate(manifest.files):
            name = manifest.file_name(rank)
            size = size_of(name)
            if size != record.nbytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UnreadableFormat(f"{name} {found}, {record.nbytes} were committed")
    except CheckpointError as error:
        return StepEntry(ref.step, "damaged", lying_bytes(), ref.attempt, ref.save, reason=str(error))
    return StepEntry(
        ref.step,
        state,
        manifest.nbytes,
        ref.attempt,
        ref.save,
        manifest.world,
        len(manifest.tensors),
        manifest.created,
        dict(manifest.metrics),
        reason,
    )


def _directory_bytes(root: Root, step: int) -> int:
    with os.scandir(root.step_path(step)) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
