"""Which coordination a job needs: none for one process, a store of our own for several."""

from __future__ import annotations

import torch.distributed as dist

from ckptengine.coordination.alone import Alone
from ckptengine.coordination.port import Coordinator
from ckptengine.coordination.torch_store import TorchStore


def choose(group: dist.ProcessGroup | None, timeout_s: float) -> Coordinator:
    """The coordinator for the ranks of ``group`` (None: all, where torch.distributed is initialised)."""
    if not dist.is_available() or not dist.is_initialized():
        return Alone()
    if dist.get_world_size(group) == 1:
        return Alone()
    return TorchStore(group, timeout_s)
