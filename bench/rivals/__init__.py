"""Every engine that is measured, each in a module of its own that is imported only in the process that runs it."""

from __future__ import annotations

import importlib

from ckptengine.errors import UnusableRequest

from ..engine import Engine

ENGINES: dict[str, tuple[str, str]] = {
    "none": ("baseline", "NoCheckpoint"),
    "pwrite": ("baseline", "RawWrite"),
    "ckptengine": ("own", "CkptEngine"),
    "torch-save": ("torch_save", "TorchSave"),
    "torch-save-fsync": ("torch_save", "TorchSaveFsync"),
    "safetensors": ("safetensors", "Safetensors"),
    "dcp-save": ("dcp", "DcpSave"),
    "dcp-async": ("dcp", "DcpAsync"),
    "dcp-async-staging": ("dcp", "DcpAsyncStaging"),
    "dcp-async-shm": ("dcp", "DcpAsyncSharedMemory"),
    "dcp-async-process": ("dcp", "DcpAsyncProcess"),
    "torch-checkpointing": ("torch_checkpointing", "TorchCheckpointing"),
    "torchsnapshot": ("torchsnapshot", "TorchSnapshot"),
    "orbax": ("orbax", "Orbax"),
    "nvrx": ("nvrx", "Nvrx"),
    "deepspeed-fast": ("deepspeed", "DeepSpeedFast"),
}
"""Name of an engine: its module here and its class."""

BASELINE = "none"
LIMIT = "pwrite"
OURS = "ckptengine"
REFERENCE = "dcp-async"
"""The rival to which ratios are given."""


def engine_class(name: str) -> type[Engine]:
    """The class of an engine; raises `Unavailable` where its packages are missing."""
    if name not in ENGINES:
        raise UnusableRequest(f"no such engine: {name}; there are {', '.join(ENGINES)}")
    module, attribute = ENGINES[name]
    found: type[Engine] = getattr(importlib.import_module(f".{module}", __name__), attribute)
    return found
