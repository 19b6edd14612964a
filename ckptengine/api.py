"""The one-shot forms."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, SupportsIndex

from ckptengine.checkpointer import Checkpointer
from ckptengine.coordination.choose import choose
from ckptengine.operations.opening import open_any
from ckptengine.operations.restore import RestoreRequest, restore_from, restore_newest
from ckptengine.operations.saving.step_number import step_number
from ckptengine.sources.detect import split_step
from ckptengine.sources.native import NativeSource
from ckptengine.store.root import Root

_TIMEOUT_S = 300.0


def save(state: Any, root: str | os.PathLike[str], step: SupportsIndex, **settings: Any) -> int:
    """Save ``state`` under ``root`` as ``step`` and return the step once it is durable.

    ``settings`` are those of `Checkpointer`.  The process's random streams are left out.  Raises what the save raises.
    """
    with Checkpointer(state, root, random=False, linear=False, **settings) as checkpointer:
        return checkpointer.save(step).result()


def load(
    state: Any,
    root: str | os.PathLike[str],
    step: SupportsIndex | None = None,
    *,
    rules: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    strict: bool = True,
) -> int:
    """Fill ``state`` in place from a checkpoint, ours or foreign, and return its step (0 where it records none).

    ``root`` is a root, a step directory, any foreign checkpoint, or ``PATH@STEP``.  Random streams are not touched.
    Raises like `Checkpointer.restore`; `NotFound` when there is nothing to load.
    """
    source = open_any(root, None if step is None else step_number(step), rules)
    request = RestoreRequest(state=state, names=names, strict=strict, random=False, timeout_s=_TIMEOUT_S)
    port = choose(None, _TIMEOUT_S)
    try:
        local = source.files.local_path("")
        if isinstance(source, NativeSource) and source.of_root and local is not None:  # others of its steps may be good
            named = step is not None or split_step(os.fspath(root))[2]
            restored = restore_newest(Root(local), source.files, port, request, 0, source.step if named else None)
            assert restored is not None
            return restored.step
        return restore_from(source, port, request, 0).step
    finally:
        port.close()
        source.files.close()
