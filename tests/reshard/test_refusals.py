"""What cannot be saved or restored exactly is refused, by name, before anything live has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import CheckpointError, Damaged, LayoutError, RanksDisagree, ReplicasDiffer, StateMismatch
from ckptengine.layout.box import Box
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.piece import whole
from ckptengine.layout.placement import Replicate, Shard
from ckptengine.layout.sharding import Sharding
from ckptengine.operations.filling.fill import Fill
from ckptengine.operations.opening import open_any
from ckptengine.state.target import Target

from .simulated import restore_all, save_all


def rows(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start * 4, stop * 4, dtype=torch.float32).view(stop - start, 4)


def sharded(start: int, stop: int, of: int = 8) -> dict[str, Any]:
    return {"w": ce.Sharded(rows(start, stop), (of, 4), offset=(start, 0))}


@pytest.mark.parametrize(
    ("states", "error", "told"),
    [
        ([sharded(0, 4), sharded(5, 8)], LayoutError, r"'w'.*nothing covers \[4:5, 0:4\]"),
        ([sharded(0, 5), sharded(4, 8)], LayoutError, r"'w'.*\[0:5, 0:4\] and \[4:8, 0:4\] overlap"),
        ([{"w": rows(0, 4)}, {"w": rows(4, 8)}], ReplicasDiffer, r"'w' on ranks \[1\]"),
        ([{"w": rows(0, 4)}, {"w": rows(4, 7)}], RanksDisagree, r"'w'.*\[4, 4\].*\[3, 4\].*Sharded"),
        ([sharded(0, 4), {"w": rows(4, 8)}], RanksDisagree, r"'w'"),
        ([sharded(0, 4), sharded(4, 8, of=9)], RanksDisagree, r"'w'.*\[8, 4\].*\[9, 4\]"),
    ],
    ids=["gap", "overlap", "undeclared shards", "undeclared uneven shards", "half declared", "global shapes"],
)
def test_a_save_that_is_not_one_state_is_refused(
    states: list[Any], error: type[CheckpointError], told: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        save_all(states, tmp_path)
    assert isinstance(caught.value, error)
    assert ce.steps(tmp_path) == []


def test_ranks_that_say_different_shardings_are_refused(tmp_path: Path) -> None:
    meshes = Mesh((2,), ("a",)), Mesh((2,), ("a",), (1, 0))
    states = [
        {"w": ce.Sharded(rows(0, 4), (8, 4), layout=Sharding(mesh, (Shard(0),)), rank=rank)}
        for rank, mesh in enumerate(meshes)
    ]
    with pytest.raises(RanksDisagree, match=r"'w'.*another sharding"):
        save_all(states, tmp_path)


def test_replicas_that_drifted_apart_are_named(tmp_path: Path) -> None:
    states = [{"w": rows(0, 8), "b": torch.full((3,), 1.0 + (rank == 2))} for rank in range(4)]
    with pytest.raises(ReplicasDiffer, match=r"'b' on ranks \[2\] of \[0, 1, 2, 3\]"):
        save_all(states, tmp_path)


def test_hand_made_shards_say_exactly_where_they_are() -> None:
    with pytest.raises(LayoutError, match="exactly one way"):
        ce.Sharded(rows(0, 4), (8, 4))
    with pytest.raises(LayoutError, match="sticks out"):
        ce.Sharded(rows(0, 4), (8, 4), offset=(6, 0))
    with pytest.raises(LayoutError, match="has 16 elements, what it is said to hold has 12"):
        ce.Sharded(rows(0, 4), (8, 4), flat=(0, 12))
    uneven = Sharding(Mesh((3,), ("a",)), (Shard(0),))  # a mesh that does not divide: 3, 3 and 2 rows
    with pytest.raises(LayoutError, match="has 12 elements, what it is said to hold has 8"):
        ce.Sharded(rows(0, 3), (8, 4), layout=uneven, rank=2)
    with pytest.raises(LayoutError, match="placements for a mesh"):
        Sharding(Mesh((2, 2), ("a", "b")), (Replicate(),))


def test_every_difference_is_told_and_nothing_changes(tmp_path: Path) -> None:
    save_all([{"w": rows(0, 8), "a": torch.ones(3), "old": torch.ones(2)}], tmp_path)
    live = [
        {**sharded(4 * r, 4 * r + 4, of=16), "a": torch.zeros(3, dtype=torch.int32), "new": torch.ones(1)}
        for r in (0, 1)
    ]
    before = [state["w"].tensor.clone() for state in live]
    with pytest.raises(StateMismatch) as caught:
        restore_all(live, tmp_path)
    told = "\n".join(caught.value.problems)
    for name in ("w", "a", "new", "old"):
        assert any(problem.startswith(f"{name}:") for problem in caught.value.problems), told
    assert all(torch.equal(state["w"].tensor, was) for state, was in zip(live, before, strict=True))
    assert not live[0]["a"].any()
    live = [{**sharded(4 * r, 4 * r + 4), "a": torch.zeros(3)} for r in (0, 1)]
    with pytest.raises(StateMismatch, match="old: in the checkpoint, not in the live state"):
        restore_all(live, tmp_path)
    assert not live[0]["a"].any()


def test_an_element_without_a_source_is_found_before_anything_changes(tmp_path: Path) -> None:
    save_all([sharded(0, 4), sharded(4, 8)], tmp_path)
    source: Any = open_any(tmp_path)
    held = Sharding(Mesh((1,), ("a",)), (Shard(0),))
    live = torch.full((8, 4), -1.0)
    target = Target("w", live, whole((8, 4)))
    Fill(source, [target]).run()
    assert torch.equal(live, rows(0, 8))
    live.fill_(-1)
    source = open_any(tmp_path)
    half = source.layout(0)
    source._layouts[0] = type(half)(half.held[:1])
    with pytest.raises(LayoutError, match=r"'w'.*nothing covers \[4:8, 0:4\].*missing"):
        Fill(source, [target])
    source._layouts[0] = held  # the extent is there, in another size than the sharding says
    with pytest.raises(Damaged, match=r"'w' has 64 bytes, 128 follow"):
        Fill(source, [target])
    assert (live == -1).all()


def test_a_rank_file_that_is_gone_is_told_before_anything_changes(tmp_path: Path) -> None:
    save_all([sharded(0, 4), sharded(4, 8)], tmp_path)
    next(tmp_path.glob("step-*/rank-00001-*")).unlink()
    live = [{"w": torch.full((8, 4), -1.0)}]
    with pytest.raises(Damaged, match=r"rank-00001.*missing.*nothing was changed"):
        restore_all(live, tmp_path)
    assert (live[0]["w"] == -1).all()


def test_boxes_are_named_in_messages() -> None:
    assert str(Box((4, 0), (4, 4))) == "[4:8, 0:4]"
