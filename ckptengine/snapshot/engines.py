"""The capture engine of a process: native where it was built, portable elsewhere or where tests ask for it."""

from __future__ import annotations

import os
import threading

from ckptengine import native
from ckptengine.snapshot.native_engine import DEFAULT, EngineSettings, NativeEngine
from ckptengine.snapshot.plain import PlainEngine
from ckptengine.snapshot.port import CaptureEngine
from ckptengine.store.files import FileOps

ENGINE_VARIABLE = "CKPTENGINE_ENGINE"
"""``native`` or ``portable``; default: native where it is there."""

_shared: dict[tuple[int, EngineSettings], CaptureEngine] = {}
_guard = threading.Lock()


def engine_for(settings: EngineSettings = DEFAULT, ops: FileOps | None = None) -> CaptureEngine:
    """The engine that all checkpointers of this process with the same settings share.

    Given its own ``ops`` a checkpointer gets a portable engine of its own, so that every operation goes through them.
    """
    if ops is not None or os.environ.get(ENGINE_VARIABLE) == "portable" or not native.available():
        return PlainEngine(ops)
    with _guard:
        key = os.getpid(), settings  # a forked child has none of its parent's threads: it builds its own
        if key not in _shared:
            _shared[key] = NativeEngine(settings)
        return _shared[key]
