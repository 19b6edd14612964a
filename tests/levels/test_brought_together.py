"""A restore that needs what several nodes have each for themselves: it is brought together on the root."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import Damaged
from tests.faults.hub import Hub, Ranks, outcome, ranks_on_own_machines

WORLD = 3
WITHIN_S = 30.0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with ranks_on_own_machines(WORLD, monkeypatch) as found:
        yield found


def state_of(step: int, rank: int) -> dict[str, Any]:
    """Replicas, of which each is written by one rank, and parts of each rank's own."""
    whole = {f"w{i}": torch.arange(3000, dtype=torch.int64) * (i + 3) + 17 * step for i in range(6)}
    part = torch.arange(5000, dtype=torch.int64) * 7 + 31 * step + 1000 * rank
    grid = ce.Sharded(part, (5000 * WORLD,), offset=(5000 * rank,))
    return {"model": whole, "grid": grid, "note": {"step": step}, "own": ce.PerRank(rank + 100 * step)}


def is_exactly(state: dict[str, Any], step: int, rank: int) -> bool:
    wanted = state_of(step, rank)
    return (
        all(torch.equal(state["model"][name], tensor) for name, tensor in wanted["model"].items())
        and torch.equal(state["grid"].tensor, wanted["grid"].tensor)
        and (state["note"], state["own"].value) == (wanted["note"], wanted["own"].value)
    )


class Cluster:
    """Runs of one job over nodes with disks of their own."""

    def __init__(self, ranks: Ranks, tmp_path: Path, tiers: int = 1) -> None:
        self.ranks, self.root = ranks, tmp_path / "root"
        self.disks = [[tmp_path / f"disk-{rank}-{tier}" for tier in range(tiers)] for rank in ranks.ranks]

    def run(self, save: int | None = None, *, order: tuple[int, ...] = (0, 1, 2), **options: Any) -> list[Any]:
        """Restore, then save a step; what each rank had restored, or the error.  ``order``: the disks of the ranks."""
        self.ranks.hub = Hub(WORLD)
        states = [state_of(0, rank) for rank in self.ranks.ranks]

        def made(rank: int) -> ce.Checkpointer:
            tiers = [ce.Tier(disk, interval=ce.Every(steps=1)) for disk in self.disks[order[rank]]]
            return ce.Checkpointer(
                states[rank], self.root, tiers=tiers, rank_timeout_s=WITHIN_S, random=False, **options
            )

        jobs = self.ranks.all(lambda rank: outcome(lambda: made(rank)))
        if isinstance(jobs[0], Exception):
            return list(jobs)
        found = self.ranks.all(lambda rank: outcome(jobs[rank].restore))
        for rank, state in enumerate(states):
            if not isinstance(found[rank], Exception):
                assert is_exactly(state, found[rank] or 0, rank)
        if save is not None:
            for rank, state in enumerate(states):
                fresh = state_of(save, rank)
                for name, tensor in fresh["model"].items():
                    state["model"][name].copy_(tensor)
                state["grid"].tensor.copy_(fresh["grid"].tensor)
                state["note"]["step"] = save
                state["own"] = fresh["own"]
            handles = self.ranks.all(lambda rank: jobs[rank].save(save))
            assert self.ranks.all(lambda rank: handles[rank].result(WITHIN_S)) == [save] * WORLD
        self.ranks.all(lambda rank: jobs[rank].close(WITHIN_S))
        return list(found)


def test_a_lost_root_comes_back_whole(ranks: Ranks, tmp_path: Path) -> None:
    cluster = Cluster(ranks, tmp_path)
    assert cluster.run(1) == [None] * WORLD
    shutil.rmtree(cluster.root)
    assert cluster.run() == [1] * WORLD
    assert ce.steps(cluster.root) == [1]
    ce.open(cluster.root).verify()
    for (disk,) in cluster.disks:
        shutil.rmtree(disk)
    assert cluster.run(2) == [1] * WORLD
    assert not [path for path in cluster.root.rglob(".*") if path.name not in (".lock", ".policy.json")]


def test_nodes_that_changed_places_find_everything(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0 is now where it was not: that node's own tier knows the run, its line of history and its root."""
    cluster = Cluster(ranks, tmp_path)
    cluster.run(1)
    shutil.rmtree(cluster.root)
    assert cluster.run(2, order=(2, 0, 1)) == [1] * WORLD
    assert ce.steps(cluster.root) == [1, 2]
    for (disk,) in cluster.disks:
        assert len(list((disk / "attempts").glob("*.claim"))) == 2
        assert not list(disk.rglob(".partial-*"))


def test_what_the_root_never_got_is_restored_from_all_nodes(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(ranks, tmp_path)
    cluster.run(1)
    shutil.copytree(cluster.root, tmp_path / "before")
    cluster.run(2)
    shutil.rmtree(cluster.root)
    (tmp_path / "before").rename(cluster.root)
    assert cluster.run(order=(1, 2, 0)) == [2] * WORLD
    assert ce.steps(cluster.root) == [1, 2]


def test_what_no_node_has_is_named(ranks: Ranks, tmp_path: Path) -> None:
    cluster = Cluster(ranks, tmp_path)
    cluster.run(1)
    shutil.rmtree(cluster.root)
    shutil.rmtree(cluster.disks[1][0])
    for refused in cluster.run():
        assert isinstance(refused, Damaged), refused
        assert "what ranks 1 of 3 wrote is neither on a tier that any rank sees nor on" in str(refused)
        assert "rank-00001-a000001-n0001.bin, with parts of 'grid'" in str(refused)
        assert "bring back the disk of the node" in str(refused)
    assert ce.steps(cluster.root) == []


def test_each_file_from_the_tier_that_still_has_it(ranks: Ranks, tmp_path: Path) -> None:
    """One node lost its first tier, another its second; what rank 2 wrote had come to the root when that was lost."""
    cluster = Cluster(ranks, tmp_path, tiers=2)
    cluster.run(1)
    (step,) = cluster.root.glob("step-*")
    (tmp_path / "kept").mkdir()
    (name,) = [path.name for path in step.glob("rank-00002-*")]
    shutil.copy(step / name, tmp_path / "kept" / name)
    shutil.rmtree(cluster.root)
    step.mkdir(parents=True)
    (tmp_path / "kept" / name).rename(step / name)
    shutil.rmtree(cluster.disks[0][0])
    shutil.rmtree(cluster.disks[1][1])
    for disk in cluster.disks[2]:
        shutil.rmtree(disk)
    assert cluster.run() == [1] * WORLD
    assert ce.steps(cluster.root) == [1]
    assert not ce.open(cluster.root).verify()
    assert not [path for path in cluster.root.rglob(".*") if path.name not in (".lock", ".policy.json")]


def test_a_file_that_only_the_root_has_is_proven_before_it_counts(ranks: Ranks, tmp_path: Path) -> None:
    cluster = Cluster(ranks, tmp_path)
    cluster.run(1)
    (manifest,) = cluster.root.glob("step-*/manifest-*")
    manifest.unlink()
    shutil.rmtree(cluster.disks[2][0])
    (file,) = cluster.root.glob("step-*/rank-00002-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for refused in cluster.run():
        assert isinstance(refused, Damaged), refused
    assert ce.steps(cluster.root) == []


def test_a_file_that_the_root_lost_is_put_back(ranks: Ranks, tmp_path: Path) -> None:
    cluster = Cluster(ranks, tmp_path)
    cluster.run(1)
    for file in cluster.root.glob("step-*/rank-*"):
        file.unlink()
    assert cluster.run() == [1] * WORLD
    assert not ce.open(cluster.root).verify()
