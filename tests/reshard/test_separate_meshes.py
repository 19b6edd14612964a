"""One tensor, sharded over a mesh of its own on each side of another axis: FSDP beside tensor parallelism, say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import LayoutError, RanksDisagree, ReplicasDiffer
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.placement import Flat, Shard
from ckptengine.layout.sharding import Sharding

from .simulated import save_all

WHOLE = torch.arange(40, dtype=torch.float32).view(10, 4)
DP = {0: (0, 2), 2: (0, 2), 1: (1, 3), 3: (1, 3)}
"""Two data-parallel meshes, one of each tensor-parallel rank."""


def part(rank: int, whole: torch.Tensor = WHOLE, meshes: dict[int, tuple[int, ...]] = DP) -> dict[str, object]:
    """What ``rank`` holds under a sharding that names only the mesh that it is in."""
    layout = Sharding(Mesh((len(meshes[rank]),), ("dp",), meshes[rank]), (Shard(0),))
    rows = layout.pieces(rank, (10, 4))[0].box
    local = whole[rows.offsets[0] : rows.offsets[0] + rows.shape[0]].clone()
    return {"w": ce.Sharded(local, (10, 4), layout=layout, rank=rank)}


def test_the_same_sharding_over_separate_meshes_is_one_tensor_stored_once(tmp_path: Path) -> None:
    save_all([part(rank) for rank in range(4)], tmp_path)
    with ce.open(tmp_path) as checkpoint:
        checkpoint.verify()
        assert torch.equal(checkpoint.read("w"), WHOLE)
        assert sum(fragment.box.size for fragment in checkpoint.source.tensor("w").fragments) == WHOLE.numel()


def test_meshes_of_one_rank_each_are_replicas(tmp_path: Path) -> None:
    alone = {rank: (rank,) for rank in range(3)}
    save_all([part(rank, meshes=alone) for rank in range(3)], tmp_path)
    with ce.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("w"), WHOLE)


def test_sides_that_drifted_apart_are_told(tmp_path: Path) -> None:
    other = WHOLE.clone()
    other[7, 1] += 1
    states = [part(rank, other if rank == 3 else WHOLE) for rank in range(4)]
    with pytest.raises(ReplicasDiffer, match="'w'"):
        save_all(states, tmp_path)


@pytest.mark.parametrize(
    "meshes",
    [{0: (0, 1), 1: (1, 2), 2: (2, 0)}, {0: (0,), 1: (1, 2), 2: (1, 2)}],
    ids=["overlapping", "of other sizes"],
)
def test_meshes_that_do_not_lie_side_by_side_are_refused(meshes: dict[int, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(RanksDisagree, match="another sharding"):
        save_all([part(rank, meshes=meshes) for rank in range(3)], tmp_path)


def flat(rank: int) -> dict[str, object]:
    """Ten elements in a flat buffer from element 6 on, of which each of four ranks has 5: the first holds none."""
    layout = Sharding(Mesh((4,), ("dp",)), (Flat(offset=6, part=5),))
    start, stop = max(0, 5 * rank - 6), max(0, min(10, 5 * rank - 1))
    return {"w": ce.Sharded(torch.arange(10.0)[start:stop], (10,), layout=layout, rank=rank)}


def test_ranks_of_a_mesh_that_hold_nothing_need_not_have_the_tensor(tmp_path: Path) -> None:
    save_all([{}, *map(flat, (1, 2, 3))], tmp_path)
    with ce.open(tmp_path) as checkpoint:
        checkpoint.verify()
        assert torch.equal(checkpoint.read("w"), torch.arange(10.0))
    with pytest.raises(LayoutError, match=r"ranks \[1\], which do not have it"):
        save_all([flat(0), {}, flat(2), flat(3)], tmp_path)
