"""A checkpointer over some ranks of the world: meshes name the world's ranks, a checkpoint those of the group."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ckptengine.errors import LayoutError
from ckptengine.layout import layout_json
from ckptengine.layout.irregular import Irregular
from ckptengine.layout.sharding import Layout, Mesh, Shard, Sharding
from ckptengine.operations.saving.structure import describe
from ckptengine.state.flatten import flatten
from ckptengine.state.leaves import FlatState


def _flat(layout: Layout) -> FlatState:
    flat = flatten({"t": torch.zeros(5, 2)}, random=False)
    leaf = flat.tensors[0]._replace(sharding=layout, global_shape=(10, 2))
    return dataclasses.replace(flat, tensors=(leaf,))


def test_a_mesh_is_named_by_the_numbers_in_the_group() -> None:
    layout = Sharding(Mesh((2,), ("dp",), (7, 4)), (Shard(0),))
    document = describe(_flat(layout), (4, 7))[0][3]
    assert layout_json.from_json(document) == Sharding(Mesh((2,), ("dp",), (1, 0)), (Shard(0),))


def test_hand_made_shards_too() -> None:
    pieces = Sharding(Mesh((2,), ("dp",)), (Shard(0),)).pieces(1, (10, 2))
    document = describe(_flat(Irregular(((7, pieces),))), (4, 7))[0][3]
    assert layout_json.from_json(document) == Irregular(((1, pieces),))


def test_a_mesh_beyond_the_group_is_refused_by_name() -> None:
    layout = Sharding(Mesh((3,), ("dp",), (4, 5, 7)), (Shard(0),))
    with pytest.raises(LayoutError, match=r"'t' lies on ranks \[5\]"):
        describe(_flat(layout), (4, 7))
