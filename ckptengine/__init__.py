"""Asynchronous multi-level checkpoints of PyTorch training states: saved lazily, verified, restored onto any layout.

Names are loaded when first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckptengine.version import version as __version__

if TYPE_CHECKING:
    from ckptengine.api import load, save
    from ckptengine.checkpoint import Checkpoint, steps
    from ckptengine.checkpoint import open_checkpoint as open
    from ckptengine.checkpointer import Checkpointer
    from ckptengine.errors import CheckpointError
    from ckptengine.operations.convert import convert
    from ckptengine.operations.saving.handle import SaveHandle
    from ckptengine.policy.failure import Tolerate
    from ckptengine.policy.interval import AutoInterval, Every
    from ckptengine.policy.keep import Keep
    from ckptengine.state.registry import register
    from ckptengine.state.sharded import PerRank, Sharded
    from ckptengine.tiers.spec import Tier

_HOMES = {
    "AutoInterval": "policy.interval",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Checkpointer": "checkpointer",
    "Every": "policy.interval",
    "Keep": "policy.keep",
    "PerRank": "state.sharded",
    "SaveHandle": "operations.saving.handle",
    "Sharded": "state.sharded",
    "Tier": "tiers.spec",
    "Tolerate": "policy.failure",
    "convert": "operations.convert",
    "load": "api",
    "open": "checkpoint",
    "register": "state.registry",
    "save": "api",
    "steps": "checkpoint",
}

__all__ = [
    "AutoInterval",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "Every",
    "Keep",
    "PerRank",
    "SaveHandle",
    "Sharded",
    "Tier",
    "Tolerate",
    "__version__",
    "convert",
    "load",
    "open",
    "register",
    "save",
    "steps",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckptengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ckptengine.{home}"), "open_checkpoint" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
