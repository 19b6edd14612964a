"""The engines that are measured, by name.  Light: imports none of them."""

from __future__ import annotations

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
"""Name of an engine: its module in `rivals` and its class."""

BASELINE = "none"
LIMIT = "pwrite"
OURS = "ckptengine"
REFERENCE = "dcp-async"
"""The rival to which ratios are given."""

RESHARDING = (OURS, "dcp-save", "dcp-async", "torch-checkpointing")
"""Engines that restore DTensors onto another number of ranks."""
