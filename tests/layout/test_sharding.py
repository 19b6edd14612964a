"""Shardings against chunking a real array, and against torch's own geometry."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.crc64 import raw_crc64, raw_positioned
from ckptengine.layout.layout_json import MeshTable, from_json, meshes_from_json, to_json
from ckptengine.layout.piece import Piece, packed_pieces
from ckptengine.layout.sharding import (
    Arithmetic,
    Flat,
    Irregular,
    Mesh,
    Partial,
    Placement,
    Replicate,
    Shard,
    Sharding,
    StridedShard,
    replicated,
)

Array = NDArray[np.int64]


def chunk(array: Array, count: int, dim: int) -> list[Array]:
    """torch.chunk, with empty arrays for the chunks it leaves out."""
    size = -(-array.shape[dim] // count)
    return [array.take(range(i * size, min((i + 1) * size, array.shape[dim])), axis=dim) for i in range(count)]


def local_by_chunking(array: Array, sharding: Sharding, coordinate: tuple[int, ...]) -> Array:
    """What a rank's local tensor contains, by cutting the whole array as torch does."""
    flat = None
    index = count = 0
    for placement, n, c in zip(sharding.placements, sharding.mesh.shape, coordinate, strict=True):
        match placement:
            case Shard(dim):
                array = chunk(array, n, dim)[c]
            case StridedShard(dim, factor):
                array = np.concatenate([chunk(part, n, dim)[c] for part in chunk(array, factor, dim)], axis=dim)
            case Flat():
                flat, index, count = placement, index * n + c, max(count, 1) * n
            case _:
                pass
    if flat is None:
        return array
    part = flat.part_for(array.shape, count)
    buffer = np.concatenate([np.full(flat.offset, -1), array.reshape(-1)])
    buffer = np.concatenate([buffer, np.full(max(0, part * count - buffer.size), -1)])
    held = buffer[index * part : (index + 1) * part]
    if flat.in_place:
        return np.where(np.isin(array, held), array, -1)
    return held if flat.padded else held[held >= 0]


def filled(pieces: tuple[Piece, ...], shape: tuple[int, ...], local_size: int) -> Array:
    """The flat local tensor that the pieces describe: the global index of each element, -1 where there is none."""
    index = np.arange(math.prod(shape)).reshape(shape)
    local = np.full(local_size, -1)
    for piece in pieces:
        places = np.full(piece.box.shape, piece.start)
        for d, stride in enumerate(piece.strides):
            places += np.arange(piece.box.shape[d]).reshape([-1] + [1] * (len(shape) - d - 1)) * stride
        assert (local[places] == -1).all(), "two pieces claim one element"
        local[places] = index[tuple(slice(a, b) for a, b in zip(piece.box.offsets, piece.box.ends, strict=True))]
    return local


@st.composite
def shardings(draw: st.DrawFn) -> tuple[Sharding, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    flat = Flat(draw(st.integers(0, 5)), padded=draw(st.booleans()))
    if draw(st.booleans()):
        flat = Flat(aligned=True, in_place=not flat.padded, padded=flat.padded)
    choices: list[st.SearchStrategy[Placement]] = [st.just(Replicate()), st.just(flat)]
    if shape:
        dims = st.integers(0, len(shape) - 1)
        choices += [st.builds(Shard, dims), st.builds(StridedShard, dims, st.integers(1, 4))]
    placements = tuple(draw(st.one_of(choices)) for _ in mesh_shape)
    ranks = draw(st.permutations(range(math.prod(mesh_shape)))) if draw(st.booleans()) else None
    names = tuple(f"axis{i}" for i in range(len(mesh_shape)))
    return Sharding(Mesh(mesh_shape, names, None if ranks is None else tuple(ranks)), placements), shape


@settings(max_examples=300)
@given(case=shardings())
def test_pieces_are_what_chunking_gives(case: tuple[Sharding, tuple[int, ...]]) -> None:
    sharding, shape = case
    index = np.arange(math.prod(shape)).reshape(shape)
    for coordinate in np.ndindex(*sharding.mesh.shape):
        rank = sharding.mesh.rank_at(coordinate)
        expected = local_by_chunking(index, sharding, coordinate)
        assert sharding.local_shape(rank, shape) == expected.shape
        local = filled(sharding.pieces(rank, shape), shape, expected.size)
        assert local.tolist() == expected.reshape(-1).tolist()


@given(case=shardings())
def test_local_sizes_are_those_of_the_pieces(case: tuple[Sharding, tuple[int, ...]]) -> None:
    sharding, shape = case
    sizes = sharding.local_sizes(shape)
    assert sizes.shape == sharding.mesh.shape
    even = all(not (isinstance(p, Flat) and p.aligned) for p in sharding.placements)
    for coordinate in np.ndindex(*sharding.mesh.shape):
        held = sum(piece.size for piece in sharding.pieces(sharding.mesh.rank_at(coordinate), shape))
        assert not even or sizes[coordinate] == held


@settings(max_examples=300)
@given(case=shardings(), data=st.data())
def test_overlapping_finds_each_element_of_a_box_once(
    case: tuple[Sharding, tuple[int, ...]], data: st.DataObject
) -> None:
    sharding, shape = case
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    box = Box(offsets, tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, offsets, strict=True)))
    replica = data.draw(st.integers(0, 5))
    found = list(sharding.overlapping(box, shape, replica=replica))
    hits = np.zeros(shape, np.int64)
    for rank, ordinal, piece in found:
        assert sharding.pieces(rank, shape)[ordinal] == piece
        assert sharding.replica_index(rank) == replica % sharding.replica_count()
        common = piece.box.intersect(box)
        assert common is not None
        hits[tuple(slice(a, b) for a, b in zip(common.offsets, common.ends, strict=True))] += 1
    assert hits.sum() == box.size
    assert hits.max(initial=0) <= 1


@given(case=shardings(), other=shardings())
def test_the_digest_does_not_depend_on_the_sharding(
    case: tuple[Sharding, tuple[int, ...]], other: tuple[Sharding, tuple[int, ...]]
) -> None:
    shape = case[1]
    tensor = np.arange(1, 1 + math.prod(shape), dtype=np.int32).reshape(shape)
    whole = raw_crc64(tensor)
    for sharding in (case[0], other[0]):
        if sharding is other[0] and len(other[1]) > len(shape):
            continue
        raw = 0
        for rank in sharding.holders():
            for piece in sharding.pieces(rank, shape) if sharding.replica_index(rank) == 0 else ():
                box = piece.box
                part = np.ascontiguousarray(tensor[tuple(map(slice, box.offsets, box.ends))])
                raw ^= raw_positioned(part, box, shape, 4)
        assert raw == whole


@given(case=shardings())
def test_replica_groups_partition_the_mesh(case: tuple[Sharding, tuple[int, ...]]) -> None:
    sharding, shape = case
    for rank in sharding.holders():
        group = sharding.replica_group(rank)
        place = sharding.replica_index(rank)
        assert place is not None
        assert group[place] == rank
        assert len(group) == sharding.replica_count()
        assert {sharding.pieces(other, shape) for other in group} == {sharding.pieces(rank, shape)}
        assert all(sharding.replica_group(other) == group for other in group)


@given(case=shardings())
def test_json_round_trip(case: tuple[Sharding, tuple[int, ...]]) -> None:
    sharding, _ = case
    assert from_json(json.loads(json.dumps(to_json(sharding)))) == sharding
    table = MeshTable()
    document = json.loads(json.dumps([to_json(sharding, table), to_json(sharding, table), table.to_json()]))
    meshes = meshes_from_json(document[2])
    assert len(meshes) == 1
    assert from_json(document[0], meshes) == from_json(document[1], meshes) == sharding


def test_geometry_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    placement_types = pytest.importorskip("torch.distributed.tensor.placement_types")
    utils = pytest.importorskip("torch.distributed.tensor._utils")
    into = {Replicate(): torch.distributed.tensor.Replicate()}
    for dim in (0, 1):
        into[Shard(dim)] = torch.distributed.tensor.Shard(dim)
        into[StridedShard(dim, 2)] = placement_types._StridedShard(dim, split_factor=2)
        into[StridedShard(dim, 3)] = placement_types._StridedShard(dim, split_factor=3)
    names = ("a", "b")
    checked = 0
    for mesh_shape, shape in itertools.product([(2, 3), (3, 2), (4, 4)], [(7, 5), (12, 6), (3, 1), (9, 10)]):
        for placements in itertools.product(into, repeat=2):
            sharding = Sharding(Mesh(mesh_shape, names), placements)
            for rank, coordinate in enumerate(np.ndindex(*mesh_shape)):
                local_shape, offset = utils._compute_local_shape_and_global_offset(
                    shape, mesh_shape, list(coordinate), [into[p] for p in placements]
                )
                assert sharding.local_shape(rank, shape) == tuple(local_shape), (placements, mesh_shape, shape)
                pieces = sharding.pieces(rank, shape)
                if pieces:
                    assert pieces[0].box.offsets == tuple(offset), (placements, mesh_shape, shape)
                    checked += 1
    assert checked > 1000


def test_torch_strided_shard_splits_the_same_indices() -> None:
    torch = pytest.importorskip("torch")
    placement_types = pytest.importorskip("torch.distributed.tensor.placement_types")
    for n, count, factor in itertools.product([1, 5, 9, 16], [2, 3, 4], [1, 2, 3, 5]):
        shards, _ = placement_types._StridedShard(0, split_factor=factor)._split_tensor(
            torch.arange(n), count, with_padding=False
        )
        sharding = Sharding(Mesh((count,), ("x",)), (StridedShard(0, factor),))
        for rank, expected in enumerate(shards):
            local = filled(sharding.pieces(rank, (n,)), (n,), expected.numel())
            assert local.tolist() == expected.tolist()


def test_fsdp_over_tp_of_one_dimension() -> None:
    """torch's documented example: the axis on the right is cut first."""
    sharding = Sharding(Mesh((2, 2), ("dp", "tp")), (StridedShard(0, 2), Shard(0)))
    rows = [sharding.pieces(rank, (8, 8))[0].box.offsets[0] for rank in range(4)]
    assert rows == [0, 4, 2, 6]


def test_meshes_are_arithmetic_where_they_can_be() -> None:
    assert Mesh((2, 3), ("a", "b"), (0, 1, 2, 3, 4, 5)).ranks == Arithmetic(0, (3, 1))
    assert Mesh((2, 3), ("a", "b"), (0, 2, 4, 1, 3, 5)).ranks == Arithmetic(0, (1, 2))
    assert Mesh((3, 1), ("a", "b"), (5, 13, 21)).ranks == Arithmetic(5, (8, 1))
    odd = Mesh((3,), ("a",), (7, 3, 9))
    assert odd.ranks == (7, 3, 9)
    assert [odd.coordinate_of(r) for r in (3, 7, 9, 8)] == [(1,), (0,), (2,), None]
    sub = Mesh((2, 2), ("a", "b"), Arithmetic(1, (8, 2)))
    assert sub.all_ranks().tolist() == [1, 3, 9, 11]
    for rank in range(-1, 14):
        coordinate = sub.coordinate_of(rank)
        assert (coordinate is not None) == (rank in (1, 3, 9, 11))
        assert coordinate is None or sub.rank_at(coordinate) == rank
    assert len(json.dumps(Mesh((100, 100), ("a", "b")).to_json())) < 50


@pytest.mark.parametrize(
    ("shape", "names", "ranks"),
    [
        ((2,), (), None),
        ((2, 2), ("a", "a"), None),
        ((0,), ("a",), None),
        ((1 << 20, 1 << 20), ("a", "b"), None),
        ((2,), ("a",), (1, 1)),
        ((2,), ("a",), (-1, 0)),
        ((2,), ("a",), (0, 1, 2)),
        ((2, 2), ("a", "b"), Arithmetic(0, (1, 1))),
        ((2,), ("a",), Arithmetic(-1, (1,))),
    ],
)
def test_bad_meshes(shape: tuple[int, ...], names: tuple[str, ...], ranks: object) -> None:
    with pytest.raises(LayoutError, match="mesh of shape"):
        Mesh(shape, names, ranks)  # type: ignore[arg-type]


def test_bad_shardings() -> None:
    mesh = Mesh((2, 2), ("a", "b"))
    with pytest.raises(LayoutError, match="1 placements for a mesh of 2 axes"):
        Sharding(mesh, (Replicate(),))
    with pytest.raises(LayoutError, match="must be equal"):
        Sharding(mesh, (Flat(), Flat(offset=2)))
    with pytest.raises(LayoutError, match="does not fit a tensor of shape"):
        Sharding(mesh, (Replicate(), Shard(1))).pieces(0, (4,))
    with pytest.raises(LayoutError, match="negative ones"):
        Shard(-1)
    with pytest.raises(LayoutError, match="asked of a tensor"):
        list(Sharding(mesh, (Shard(0), Replicate())).overlapping(Box((0,), (5,)), (4,)))


def test_ranks_outside_the_mesh_hold_nothing() -> None:
    sharding = Sharding(Mesh((2,), ("x",), (4, 6)), (Shard(0),))
    assert sharding.pieces(5, (8,)) == ()
    assert sharding.local_shape(5, (8,)) == (0,)
    assert sharding.replica_group(5) == ()
    assert sharding.replica_index(5) is None


def test_replicated() -> None:
    sharding = replicated([0, 3, 4])
    assert sharding.replica_group(3) == (0, 3, 4)
    assert sharding.pieces(4, ()) == (Piece(Box((), ()), 0, ()),)


def test_partial_ranks_are_no_replicas() -> None:
    sharding = Sharding(Mesh((2,), ("x",)), (Partial(),))
    assert sharding.replica_count() == 1
    assert [rank for rank, _, _ in sharding.overlapping(Box.whole((3,)), (3,))] == [0, 1]


def test_irregular() -> None:
    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 3))
    two = packed_pieces([left, right])
    sharding = Irregular(((0, (Piece(left, 0, (5, 1)),)), (2, packed_pieces([left])), (5, two)))
    assert sharding.replica_group(2) == (0, 2)
    assert sharding.replica_index(2) == 1
    assert sharding.pieces(1, (4, 5)) == ()
    assert sharding.local_shape(5, (4, 5)) == (20,)
    assert sharding.local_shape(0, (4, 5)) == (17,)
    assert list(sharding.overlapping(Box((0, 4), (1, 1)), (4, 5), replica=1)) == [(5, 1, two[1])]
    assert from_json(json.loads(json.dumps(to_json(sharding)))) == sharding
    with pytest.raises(LayoutError, match="outside a tensor of shape"):
        sharding.pieces(5, (4, 4))
    with pytest.raises(LayoutError, match="distinct, ascending"):
        Irregular(((3, ()), (1, ())))


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"mesh": 0},
        {"mesh": 7, "placements": ["R"]},
        {"mesh": True, "placements": ["R"]},
        {"mesh": {"shape": [2]}, "placements": ["R"]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": "R"},
        {"mesh": {"shape": [2.0], "axes": ["x"]}, "placements": ["R"]},
        {"mesh": {"shape": [10**30], "axes": ["x"]}, "placements": ["R"]},
        {"mesh": {"shape": [2], "axes": [1]}, "placements": ["R"]},
        {"mesh": {"shape": [2], "axes": ["x"], "ranks": [0]}, "placements": ["R"]},
        {"mesh": {"shape": [2], "axes": ["x"], "start": 0}, "placements": ["R"]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": ["Q"]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["S", -1]]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["SS", 0, 0]]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["SS", 0, 1 << 40]]},
        {"mesh": {"shape": [1] * 99, "axes": [str(i) for i in range(99)]}, "placements": ["R"] * 99},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["F", {"part": 0}]]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["F", {"padded": 1}]]},
        {"mesh": {"shape": [2], "axes": ["x"]}, "placements": [["F", {"other": 1}]]},
        {"held": [[0]]},
        {"held": [["0", []]]},
        {"held": [[0, [[[0], [1, 2]]]]]},
        {"held": [[0, [[[0], [1], 0, [1, 1]]]]]},
        {"held": [[0, [[[0], [-1]]]]]},
        {"held": 3},
    ],
)
def test_hostile_documents(document: object) -> None:
    with pytest.raises(LayoutError):
        from_json(document)
