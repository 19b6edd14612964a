"""torch_checkpointing: shared-memory staging on a thread, and a process that writes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from ..disk import open_direct
from ..engine import Engine, Wait, require
from ..state import LiveState


def takes_unaligned_direct_writes(folder: Path) -> bool:
    """Whether a direct write of any length works, which this engine relies on and ext4 and XFS refuse."""
    path = folder / "probe-direct"
    descriptor, direct = open_direct(path, os.O_CREAT | os.O_WRONLY)
    try:
        return not direct or os.write(descriptor, b"unaligned") > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)
        path.unlink()


class TorchCheckpointing(Engine):
    """`CheckpointManager` with its asynchronous defaults; the update runs under `manager.lock()`."""

    distributions: ClassVar[tuple[str, ...]] = ("torch_checkpointing",)
    configuration: ClassVar[str] = (
        "CheckpointManager, asynchronous defaults, staging prewarmed, lock() around the update; "
        "its direct I/O off where the file system refuses unaligned direct writes"
    )
    reshards: ClassVar[bool] = True

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        module = require("torch_checkpointing")
        items = {}
        if dist.is_initialized():
            resharder = require("torch_checkpointing.default_resharder", "torch_checkpointing").DefaultResharder
            items = {"tensors": module.ItemSpec(resharder=resharder())}
        self._manager = module.CheckpointManager.Config(items=items, **self._storage()).build()
        self._manager.prewarm_staging(state.nested())
        self._lock: AbstractContextManager[Any] | None = None
        self._written: Any = None

    def _storage(self) -> dict[str, Any]:
        if takes_unaligned_direct_writes(self.root):
            return {}
        filesystem = require("torch_checkpointing.storage.filesystem", "torch_checkpointing")
        return {"storage_config": filesystem.LocalFileSystemStorageConfig(use_direct_io=False)}

    def save(self, step: int) -> Wait:
        if self._written is not None:
            self._written.result()
        written = self._manager.save(str(self.path(step)), self.state.nested())
        self._written = written

        def wait() -> None:
            written.result()

        return wait

    def before_update(self) -> None:
        self._lock = self._manager.lock()
        self._lock.__enter__()

    def after_update(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def restore(self, step: int) -> None:
        nested = self.state.nested()
        self.state.fill(self._manager.load(str(self.path(step)), into=nested, strict=True))

    def close(self) -> None:
        self._manager.close()
