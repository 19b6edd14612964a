"""Writers: every element once, and balanced."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.cover import prove_cover
from ckptengine.layout.piece import Piece, packed_pieces
from ckptengine.layout.sharding import (
    Flat,
    Irregular,
    Layout,
    Mesh,
    Replicate,
    Shard,
    Sharding,
    StridedShard,
    replicated,
)
from ckptengine.plan.write import (
    Owner,
    Planned,
    SplitOverReplicas,
    assign_writers,
    stored_overlapping,
    stored_pieces,
    writer_from_json,
    writer_to_json,
)

PLACEMENTS = [Replicate(), Shard(0), Shard(1), StridedShard(0, 2), Flat()]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    if draw(st.booleans()):
        mesh = Mesh((draw(st.integers(1, 4)), draw(st.integers(1, 3))), ("a", "b"))
        return Sharding(mesh, tuple(draw(st.sampled_from(PLACEMENTS)) for _ in range(2)))
    at = draw(st.integers(0, 4))
    held = [[Box((0, 0), (at, 6))], [Box((at, 0), (5 - at, 6))]]
    owners = draw(st.lists(st.integers(0, 1), min_size=2, max_size=5))
    return Irregular(tuple((rank, packed_pieces(held[which])) for rank, which in enumerate([0, 1, *owners])))


@settings(max_examples=300)
@given(layout=layouts(), split=st.booleans(), data=st.data())
def test_every_element_is_written_once_by_a_rank_that_holds_it(
    layout: Layout, split: bool, data: st.DataObject
) -> None:
    shape = (5, 6)
    (writer,) = assign_writers([Planned("w", "int16", shape, layout)], world=16, split_bytes=0 if split else 10**9)
    ranks = layout.holders()
    stored = {rank: stored_pieces(layout, writer, shape, rank) for rank in ranks}
    prove_cover("w", shape, [piece.box for pieces in stored.values() for piece in pieces])
    for rank, pieces in stored.items():
        for piece in pieces:
            assert any(held.box.contains(piece.box) and matches(held, piece) for held in layout.pieces(rank, shape))
    offsets = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 6)))
    extents = data.draw(st.tuples(st.integers(0, 5 - offsets[0]), st.integers(0, 6 - offsets[1])))
    box = Box(offsets, extents)
    found = list(stored_overlapping(layout, writer, shape, box))
    expected = [(rank, i, piece) for rank in ranks for i, piece in enumerate(stored[rank]) if piece.box.intersect(box)]
    assert sorted(found, key=lambda item: item[:2]) == expected
    assert writer_from_json(writer_to_json(writer)) == writer


def matches(held: Piece, part: Piece) -> bool:
    inner = held.part(part.box)
    same = all(n <= 1 or a == b for n, a, b in zip(part.box.shape, inner.strides, part.strides, strict=True))
    return inner.start == part.start and same


def loads(tensors: list[Planned], world: int, **options: int) -> list[int]:
    sizes = {"float32": 4, "bfloat16": 2}
    writers = assign_writers(tensors, world=world, **options)
    return [
        sum(
            piece.size * sizes[tensor.dtype]
            for tensor, writer in zip(tensors, writers, strict=True)
            for piece in stored_pieces(tensor.layout, writer, tensor.shape, rank)
        )
        for rank in range(world)
    ]


def test_replicas_are_balanced_by_bytes() -> None:
    everyone = replicated(range(8))
    shapes = [(10 + 37 * i, 64) for i in range(150)] + [(64,)] * 200
    tensors = [Planned(f"w{i}", "float32", shape, everyone) for i, shape in enumerate(shapes)]
    balanced = loads(tensors, 8)
    assert max(balanced) - min(balanced) < 0.02 * max(balanced)


def test_a_large_tensor_is_split_over_its_replicas_by_rows() -> None:
    mesh = Mesh((4, 2), ("dp", "tp"))
    tensor = Planned("embedding", "bfloat16", (4096, 2048), Sharding(mesh, (Replicate(), Shard(0))))
    (writer,) = assign_writers([tensor], world=8, split_bytes=1 << 20)
    assert writer == SplitOverReplicas()
    pieces = [stored_pieces(tensor.layout, writer, tensor.shape, rank) for rank in range(8)]
    assert [[piece.box.shape for piece in held] for held in pieces] == [[(512, 2048)]] * 8
    assert pieces[2][0].start == 512 * 2048
    assert loads([tensor], 8, split_bytes=1 << 20) == [4096 * 2048 * 2 // 8] * 8


def test_owners_make_up_for_what_only_one_rank_holds() -> None:
    alone = Planned("alone", "float32", (900,), replicated([0]))
    shared = [Planned(f"s{i}", "float32", (100,), replicated([0, 1])) for i in range(9)]
    assert loads([alone, *shared], 2, pack_bytes=0) == [3600, 3600]


def test_small_neighbours_stay_together() -> None:
    small = [Planned(f"b{i}", "float32", (256,), replicated(range(16))) for i in range(100)]
    large = [Planned(f"w{i}", "float32", (1 << 20,), replicated(range(16))) for i in range(128)]
    writers = assign_writers(small + large, world=16)
    assert len(set(writers[:100])) == 1
    assert len(set(writers)) == 16
    assert max(loads(small, 16)) <= 2 * 100 * 1024 / 16


def test_order_and_arguments_alone_decide() -> None:
    mesh = Mesh((3, 2), ("a", "b"))
    tensors = [Planned(f"w{i}", "float32", (7 * i + 1, 5), Sharding(mesh, (Replicate(), Shard(0)))) for i in range(20)]
    assert assign_writers(tensors, world=6) == assign_writers(list(tensors), world=6)


def test_ten_thousand_ranks_by_a_thousand_tensors() -> None:
    mesh = Mesh((10, 1000), ("replica", "shard"))
    tensors = [
        Planned(f"w{i}", "bfloat16", (8192 + i, 64), Sharding(mesh, (Replicate(), Shard(0)))) for i in range(1000)
    ]
    begin = time.process_time()
    writers = assign_writers(tensors, world=10_000)
    assert time.process_time() - begin < 5
    counts = np.bincount([writer.index for writer in writers if isinstance(writer, Owner)], minlength=10)
    assert counts.min() > 80


def test_bad_input() -> None:
    with pytest.raises(LayoutError, match="world of 2 ranks"):
        assign_writers([Planned("w", "float32", (4,), replicated([0, 5]))], world=2)
    for document in (None, "other", -1, True, 1.5):
        with pytest.raises(LayoutError):
            writer_from_json(document)
    with pytest.raises(LayoutError, match="irregular"):
        stored_pieces(Irregular(()), SplitOverReplicas(), (1,), 0)
