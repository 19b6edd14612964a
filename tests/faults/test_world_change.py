"""``on_world_change``: what becomes of per-rank values and random streams on another number of ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import StateMismatch

from .hub import outcome, ranks_in_process


def state_of(rank: int) -> dict[str, Any]:
    return {"w": torch.arange(4.0), "own": ce.PerRank({"seen": 100 + rank, "t": torch.full((2,), float(rank))})}


def save(world: int, root: Path, monkeypatch: pytest.MonkeyPatch, *, streams: bool = False) -> None:
    def job(rank: int) -> None:
        with ce.Checkpointer(state_of(rank), root, random=streams) as checkpointer:
            checkpointer.save(1).result()

    with monkeypatch.context() as patch, ranks_in_process(world, patch) as ranks:
        ranks.all(job)


def restored(
    world: int, root: Path, monkeypatch: pytest.MonkeyPatch, policy: Any, *, streams: bool = False
) -> list[Any]:
    """What each rank then holds of its own, or the error of its restore; it began with -1."""

    def job(rank: int) -> Any:
        state: dict[str, Any] = {"w": torch.zeros(4), "own": ce.PerRank({"seen": -1, "t": torch.full((2,), -1.0)})}
        with ce.Checkpointer(state, root, random=streams, on_world_change=policy) as checkpointer:
            found = outcome(checkpointer.restore)
        own, whole = state["own"], bool(state["w"][3] == 3)
        return found if found != 1 else (whole, own.value["seen"], own.value["t"].tolist())

    with monkeypatch.context() as patch, ranks_in_process(world, patch) as ranks:
        return ranks.all(job)


@pytest.mark.parametrize("policy", ["derive", "exact", "fail"])
def test_the_same_number_of_ranks_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    save(2, tmp_path, monkeypatch)
    assert restored(2, tmp_path, monkeypatch, policy) == [(True, 100, [0.0, 0.0]), (True, 101, [1.0, 1.0])]


@pytest.mark.parametrize("policy", ["derive", "exact"])
def test_on_fewer_ranks_each_has_its_own_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    save(3, tmp_path, monkeypatch)
    assert restored(2, tmp_path, monkeypatch, policy) == [(True, 100, [0.0, 0.0]), (True, 101, [1.0, 1.0])]


def test_on_more_ranks_the_new_ones_keep_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1, tmp_path, monkeypatch)
    assert restored(2, tmp_path, monkeypatch, "derive") == [(True, 100, [0.0, 0.0]), (True, -1, [-1.0, -1.0])]


@pytest.mark.parametrize(("policy", "world"), [("exact", 2), ("fail", 2), ("fail", 3)])
def test_what_is_not_wanted_is_refused_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, world: int
) -> None:
    save(1, tmp_path, monkeypatch)
    for error in restored(world, tmp_path, monkeypatch, policy):
        assert isinstance(error, StateMismatch)
        assert "nothing was changed" in str(error)


def test_derived_streams_are_another_s_on_each_rank_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(5)
    save(2, tmp_path, monkeypatch, streams=True)
    drawn = []
    for policy in ("derive", "derive", "exact"):
        assert all(one[0] for one in restored(1, tmp_path, monkeypatch, policy, streams=True))
        drawn.append(random.random())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[2] == random.Random(5).random(), "exactly as they were at the save"
    refused = restored(1, tmp_path, monkeypatch, "fail", streams=True)
    assert isinstance(refused[0], StateMismatch)
