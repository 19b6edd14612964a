"""Two nodes with disks of their own in front of a root that is lost, or that the disk of one of them is not of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import Conflict, Damaged
from tests.faults.hub import Hub, Ranks, outcome, ranks_on_own_machines

WORLD = 2
WITHIN_S = 30.0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with ranks_on_own_machines(WORLD, monkeypatch) as found:
        yield found


def state_of(job: str, step: int, rank: int) -> dict[str, Any]:
    """Nothing that only one of the nodes would write for both."""
    part = torch.arange(5000, dtype=torch.int64) * 7 + 31 * step + 1000 * rank + 10**6 * ord(job[0])
    return {"grid": ce.Sharded(part, (5000 * WORLD,), offset=(5000 * rank,)), "step": step}


def train(ranks: Ranks, root: Path, disks: list[Path], step: int, run: str | None = None) -> list[Any]:
    """Restore, and save ``step``; what each rank had restored, or the error of its construction."""
    ranks.hub = Hub(WORLD)
    states = [state_of(root.name, 0, rank) for rank in ranks.ranks]
    tiers = [[ce.Tier(disk)] for disk in disks]
    made = ranks.all(
        lambda rank: outcome(
            lambda: ce.Checkpointer(
                states[rank], root, tiers=tiers[rank], run=run, rank_timeout_s=WITHIN_S, random=False
            )
        )
    )
    if isinstance(made[0], Exception):
        return list(made)
    found = ranks.all(lambda rank: made[rank].restore())
    for rank, state in enumerate(states):
        assert state["step"] == (found[rank] or 0)
        assert torch.equal(state["grid"].tensor, state_of(root.name, state["step"], rank)["grid"].tensor)
        state["grid"].tensor.copy_(state_of(root.name, step, rank)["grid"].tensor)
        state["step"] = step
    handles = ranks.all(lambda rank: made[rank].save(step))
    assert ranks.all(lambda rank: handles[rank].result(WITHIN_S)) == [step] * WORLD
    ranks.all(lambda rank: made[rank].close(WITHIN_S))
    return list(found)


def disks_of(tmp_path: Path, name: str) -> list[Path]:
    return [tmp_path / f"{name}-disk-{rank}" for rank in range(WORLD)]


def test_a_root_that_was_lost_comes_back_from_all_nodes(ranks: Ranks, tmp_path: Path) -> None:
    root, disks = tmp_path / "root", disks_of(tmp_path, "a")
    assert train(ranks, root, disks, 1) == [None, None]
    shutil.rmtree(root)
    assert train(ranks, root, disks, 2) == [1, 1]
    for disk in disks:
        shutil.rmtree(disk)
    assert train(ranks, root, disks, 3) == [2, 2]


@pytest.mark.parametrize("run", [None, "gpt"])
def test_the_disk_of_one_node_is_another_job_s(ranks: Ranks, tmp_path: Path, run: str | None) -> None:
    mixed = two_jobs(ranks, tmp_path, run)
    for refused in train(ranks, tmp_path / "a", mixed, 2, run):
        assert isinstance(refused, Conflict), refused
        assert "b-disk-1 holds step 1 of run" in str(refused)
    assert train(ranks, tmp_path / "a", disks_of(tmp_path, "a"), 2) == [1, 1]


def two_jobs(ranks: Ranks, tmp_path: Path, run: str | None) -> list[Path]:
    """Two jobs as far as step 1; the disk of the first node of one, and that of the second node of the other."""
    for name in ("a", "b"):
        train(ranks, tmp_path / name, disks_of(tmp_path, name), 1, run)
    return [disks_of(tmp_path, "a")[0], disks_of(tmp_path, "b")[1]]


def test_ranks_never_restore_from_two_jobs(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where nothing had looked at the tiers before: all that is intact by itself is not of one checkpoint."""
    mixed = two_jobs(ranks, tmp_path, "gpt")
    monkeypatch.setattr("ckptengine.operations.levels.levels.require_own", lambda *found: None)
    with pytest.raises(Damaged, match="rank 1: what it has under the name of this commit is another job's"):
        train(ranks, tmp_path / "a", mixed, 2, "gpt")


def test_what_nobody_can_vouch_for_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """The root is gone, and what the first node knew of it: the part of the second is of no use, and in the way."""
    root, disks = tmp_path / "root", disks_of(tmp_path, "a")
    train(ranks, root, disks, 1)
    shutil.rmtree(root)
    shutil.rmtree(disks[0])
    for refused in train(ranks, root, disks, 2):
        assert isinstance(refused, Conflict), refused
        assert "neither" in str(refused)
        assert "disk-1 holds step 1" in str(refused)
    shutil.rmtree(disks[1])
    assert train(ranks, root, disks, 2) == [None, None]
