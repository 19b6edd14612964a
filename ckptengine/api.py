"""The one-shot forms."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, SupportsIndex

from ckptengine.checkpointer import Checkpointer
from ckptengine.coordination.choose import choose
from ckptengine.operations.load import load_path
from ckptengine.operations.restore import RestoreRequest
from ckptengine.operations.saving.step_number import step_number

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
    request = RestoreRequest(state=state, names=names, strict=strict, random=False, timeout_s=_TIMEOUT_S)
    port = choose(None, _TIMEOUT_S)
    try:
        return load_path(root, None if step is None else step_number(step), rules, port, request, 0)
    finally:
        port.close()
