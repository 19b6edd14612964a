"""The verb load: fill a live state in place from whatever lies at a path, on all ranks alike."""

from __future__ import annotations

import os

from ckptengine.coordination.port import Coordinator, agree
from ckptengine.errors import CheckpointError, RanksDisagree
from ckptengine.operations.opening import open_any
from ckptengine.operations.restore import RestoreRequest, restore_from, restore_newest
from ckptengine.sources.detect import split_step
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Source
from ckptengine.store.root import Root

Path = str | os.PathLike[str]


def load_path(
    path: Path, step: int | None, rules: Path | None, port: Coordinator, request: RestoreRequest, number: int
) -> int:
    """Fill the state from a checkpoint, ours or foreign, and return its step (0 where it records none).

    Of a root of ours without a step it is the newest one that verifies.  ``number``: of no other restore over ``port``.
    Raises like `open_any` and `restore_newest`; where another rank cannot open the path, `RanksDisagree`.
    """
    source = _open_alike(path, step, rules, port, request.timeout_s, number)
    try:
        local = source.files.local_path("")
        if isinstance(source, NativeSource) and source.of_root and local is not None:  # others of its steps may be good
            named = step is not None or split_step(os.fspath(path))[2]
            restored = restore_newest(Root(local), source.files, port, request, number, source.step if named else None)
            assert restored is not None
            return restored.step
        return restore_from(source, port, request, number).step
    finally:
        source.files.close()


def _open_alike(
    path: Path, step: int | None, rules: Path | None, port: Coordinator, timeout_s: float, number: int
) -> Source:
    """Open it on every rank or on none: a rank that cannot must not leave the others waiting for it."""
    source: Source | None = None
    error: CheckpointError | None = None
    try:
        source = open_any(path, step, rules)
    except CheckpointError as found:
        error = found
    told = agree(port, f"open/{number}", None if error is None else str(error), timeout_s)
    if source is not None and not any(told):
        return source
    if source is not None:
        source.files.close()
    if error is not None:
        raise error
    wrong = "; ".join(f"rank {rank}: {why}" for rank, why in enumerate(told) if why)
    raise RanksDisagree(f"{os.fspath(path)} opens here and not on every rank ({wrong}); nothing was changed")
