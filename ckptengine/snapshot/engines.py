"""The capture engine of a process: native where it was built, portable elsewhere or where tests ask for it."""

from __future__ import annotations

import os
import threading

from ckptengine import native
from ckptengine.snapshot.native_engine import NativeEngine
from ckptengine.snapshot.plain import PlainEngine
from ckptengine.snapshot.port import CaptureEngine
from ckptengine.store.files import FileOps

ARENA_BYTES = 64 << 20
ENGINE_VARIABLE = "CKPTENGINE_ENGINE"
"""``native`` or ``portable``; default: native where it is there."""

_shared: dict[int, CaptureEngine] = {}
_guard = threading.Lock()


def engine_for(arena_bytes: int | None = None, ops: FileOps | None = None) -> CaptureEngine:
    """The engine that all checkpointers of this process with the same arena share.

    Given its own ``ops`` a checkpointer gets a portable engine of its own, so that every operation goes through them.
    """
    if ops is not None or os.environ.get(ENGINE_VARIABLE) == "portable" or not native.available():
        return PlainEngine(ops)
    size_bytes = arena_bytes or ARENA_BYTES
    with _guard:
        # A forked child has none of its parent's threads: it builds its own.
        key = os.getpid() << 48 ^ size_bytes
        if key not in _shared:
            _shared[key] = NativeEngine(size_bytes)
        return _shared[key]
