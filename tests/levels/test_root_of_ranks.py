"""A root behind tiers that is not one place for all ranks: refused before the commit there, as a direct root is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import CoordinationFailed, SaveFailed
from ckptengine.operations.drain import DrainSettings
from ckptengine.operations.levels.levels import Levels
from ckptengine.operations.saving import one_place
from ckptengine.store.history import History
from ckptengine.store.root import Root

from ..reshard.simulated import on_ranks
from ..tiers.steps import Step, Threads, landed_of, write_step

SETTINGS = DrainSettings(part_bytes=1 << 20, rank_timeout_s=20)
WITHIN_S = 30.0
WORLD = 2


def nodes(tmp_path: Path, roots: list[Path], step: int) -> tuple[list[Levels], list[Step]]:
    """One rank on each node, with a disk of its own that has only its own file, and its own view of the root."""
    shared: dict[str, bytes] = {}
    levels, steps = [], []
    for rank in range(WORLD):
        disk = tmp_path / f"disk-{rank}"
        steps.append(write_step(disk, step, world=WORLD))
        (disk / steps[-1].names[1 - rank]).unlink()
        port = Threads(rank, WORLD, shared)
        levels.append(Levels(roots[rank], [ce.Tier(disk)], port=port, settings=SETTINGS))
    return levels, steps


def carry(levels: list[Levels], steps: list[Step]) -> list[BaseException | None]:
    futures = [each.landed(landed_of(step, rank)) for rank, (each, step) in enumerate(zip(levels, steps, strict=True))]
    return [future.exception(WITHIN_S) for future in futures]


def test_a_root_that_ranks_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_place, "VISIBLE_S", 0.2)
    roots = [tmp_path / "here", tmp_path / "there"]
    levels, steps = nodes(tmp_path, roots, 5)
    first, second = carry(levels, steps)
    assert isinstance(first, SaveFailed)
    assert "step 5 is not committed, because the files of ranks [1] are not there" in str(first)
    assert "the root behind the tiers is not one place for all ranks" in str(first)
    assert isinstance(second, CoordinationFailed)
    assert "rank 0 failed (save-failed" in str(second), "every rank is told which one failed and why"
    assert all(not History(Root(root)).line() for root in roots)
    assert sorted(History(Root(tmp_path / "disk-0")).line()) == [5], "it stays where it was"
    for each in reversed(levels):
        assert each.close(10)


def test_files_that_show_late_on_the_root_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    levels, steps = nodes(tmp_path, [root, root], 5)
    flat = levels[0]._levels[-1].flat
    real, began_s, asked = flat.stat, time.monotonic(), []

    def late(name: str) -> object:
        if "rank-00001" in name:
            asked.append(name)
            return real(name) if time.monotonic() > began_s + 1.0 and len(asked) > 1 else None
        return real(name)

    monkeypatch.setattr(flat, "stat", late)
    assert carry(levels, steps) == [None, None]
    assert len(asked) > 1
    assert sorted(History(Root(root)).line()) == [5]
    asked.clear()
    more = [write_step(tmp_path / f"disk-{rank}", 6, world=WORLD, save=2) for rank in range(WORLD)]
    assert carry(levels, more) == [None, None]
    assert not asked, "a root that was seen to be one place is not asked again"
    for each in reversed(levels):
        assert each.close(10)


def test_a_checkpointer_says_it_on_its_handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_place, "VISIBLE_S", 0.2)
    told: list[BaseException | None] = [None] * WORLD

    def work(rank: int) -> None:
        rows = torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2].clone()
        state = {"w": ce.Sharded(rows, (4, 2), offset=(2 * rank, 0))}
        tiers = [ce.Tier(tmp_path / f"disk-{rank}")]
        saving = ce.Checkpointer(state, tmp_path / f"root-{rank}", tiers=tiers, random=False, rank_timeout_s=20)
        handle = saving.save(1)
        told[rank] = handle.exception(WITHIN_S)
        assert handle.wait("committed"), "it is on the tiers in front"
        assert handle.stage == "failed"
        saving._close(20)

    on_ranks(WORLD, work)
    assert all("files of ranks [1] are not there" in str(error) for error in told)
    assert ce.steps(tmp_path / "root-0") == ce.steps(tmp_path / "root-1") == []
