"""Buffers that each rank has of its own: the first rank's are kept of statistics, and of what DDP broadcasts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptengine as ce
from ckptengine.errors import ReplicasDiffer
from ckptengine.state.flatten import flatten
from ckptengine.state.walker import Walker

from .hub import ranks_in_process

WORLD = 3
WITHIN_S = 10.0
STATISTICS = {"model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"}


class Norm(nn.BatchNorm1d):
    """A normalization that holds another number too."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        inner = nn.Module()
        inner.register_buffer("other", torch.zeros(2))
        self.add_module("inner", inner)


def wrapped(rank: int, value: float, **options: Any) -> DistributedDataParallel:
    """A rank's module, as another batch on each rank leaves it: only the running statistics differ."""
    torch.manual_seed(0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    try:
        module = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), Norm(4)), **options)
    finally:
        dist.destroy_process_group()
    module.module[1].running_mean.fill_(value)
    module.module[1].inner.other.fill_(value)
    return module


def save_and_restore(root: Path, patch: pytest.MonkeyPatch, saving: list[nn.Module], filling: list[nn.Module]) -> None:
    """Saves ``saving`` and restores into ``filling``, each rank its own."""
    with ranks_in_process(WORLD, patch) as ranks:
        for modules, call in ((saving, "save"), (filling, "restore")):
            ranks.hub.messages.clear()
            members = ranks.all(lambda rank, of=modules: ce.Checkpointer({"model": of[rank]}, root, random=False))  # type: ignore[misc]
            try:
                done = ranks.all(
                    lambda rank, by=members, do=call: by[rank].save(1) if do == "save" else by[rank].restore()
                )  # type: ignore[misc]
                errors = [one.exception(WITHIN_S) for one in done if isinstance(one, ce.SaveHandle)]
                if any(errors):
                    raise next(error for error in errors if error is not None)
            finally:
                ranks.all(lambda rank, by=members: by[rank]._close(WITHIN_S))  # type: ignore[misc]


def test_those_of_the_first_rank_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = [wrapped(rank, 10.0 + rank) for rank in range(WORLD)]
    filling = [wrapped(rank, -1.0) for rank in range(WORLD)]
    save_and_restore(tmp_path, monkeypatch, [*saving], [*filling])
    with ce.open(tmp_path, 1) as checkpoint:
        assert checkpoint.read("model.1.running_mean").tolist() == [10.0] * 4
        assert checkpoint.read("model.1.inner.other").tolist() == [10.0] * 2
    assert [module.module[1].running_mean.tolist() for module in filling] == [[10.0] * 4] * WORLD


def test_they_are_there_where_the_first_rank_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = [wrapped(1, 7.0) for _ in range(WORLD)]
    save_and_restore(tmp_path, monkeypatch, [*saving], [*saving])
    with ce.open(tmp_path, 1) as checkpoint:
        assert checkpoint.read("model.1.running_mean").tolist() == [7.0] * 4


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
def test_of_what_nobody_broadcasts_only_statistics_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [wrapped(rank, 10.0 + rank, broadcast_buffers=False) for rank in range(WORLD)]
    with pytest.raises(ReplicasDiffer, match=r"other") as told:
        save_and_restore(tmp_path / "a", monkeypatch, [*modules], [*modules])
    assert "running_mean" not in str(told.value)
    plain = [module.module[1] for module in modules]
    for module in plain:
        module.inner.other.zero_()
    filling = [module.module[1] for module in (wrapped(rank, -1.0) for rank in range(WORLD))]
    save_and_restore(tmp_path / "b", monkeypatch, plain, filling)
    assert [module.running_mean.tolist() for module in filling] == [[10.0] * 4] * WORLD


def test_which_ones_follow() -> None:
    first, second = wrapped(0, 0.0), wrapped(1, 0.0)
    assert not any(leaf.follows for leaf in flatten({"model": first}, random=False).tensors)
    walker = Walker({"model": second, "of": second.module[1]}, random=False)
    assert {leaf.name for leaf in walker.flatten().tensors if leaf.follows} == STATISTICS | {"model.1.inner.other"}
    key = walker.flatten().structure_key
    second._register_buffer_comm_hook(None, lambda state, buffers: None)  # type: ignore[no-untyped-call]
    again = walker.flatten()
    assert {leaf.name for leaf in again.tensors if leaf.follows} == STATISTICS
    assert again.structure_key != key
