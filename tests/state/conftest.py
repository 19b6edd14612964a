"""Ranks that are simulated one after another in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptengine.state import tensors


@pytest.fixture
def as_rank() -> Iterator[object]:
    def start(rank: int, world: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        tensors._SHARDINGS.clear()  # equal meshes of another rank
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()
