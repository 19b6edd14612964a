"""Read plans carried out on byte strings, against index-valued tensors."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.fragment_index import FragmentIndex
from ckptengine.layout.piece import Piece
from ckptengine.layout.sharding import Flat, Mesh, Replicate, Shard, Sharding, StridedShard
from ckptengine.layout.tensor import Fragment
from ckptengine.plan.read import ReadPlan, Wanted, plan_reads

ITEM = np.dtype("<i4")
Array = NDArray[np.int32]


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))


def index_tensor(shape: tuple[int, ...], first: int = 0) -> Array:
    return np.arange(first, first + math.prod(shape), dtype=ITEM).reshape(shape)


def carry_out(plan: ReadPlan, files: dict[str, bytes], targets: list[Array]) -> None:
    """Every read in order, every copy by the definition of its loops."""
    before: tuple[str, int] = ("", 0)
    for read in plan.reads:
        assert (read.file, read.offset) >= before, "reads overlap or are out of order"
        before = read.file, read.offset + read.nbytes
        data = files[read.file][read.offset : read.offset + read.nbytes]
        assert len(data) == read.nbytes, "a read beyond the end of the file"
        if read.is_direct:
            (copy,) = read.copies
            n = read.nbytes // copy.item_bytes
            targets[copy.target][copy.target_start : copy.target_start + n] = np.frombuffer(data, ITEM)
            continue
        for copy in read.copies:
            for index in np.ndindex(*copy.shape):
                source = copy.source_start + 4 * int(np.dot(index, copy.source_strides))
                target = copy.target_start + int(np.dot(index, copy.target_strides))
                assert targets[copy.target][target] == -1, "an element is written twice"
                targets[copy.target][target] = np.frombuffer(data, ITEM, 1, source)[0]


def store(tensor: Array, stored: dict[int, tuple[Piece, ...]], files: dict[str, bytes]) -> list[Fragment]:
    """Rank files that hold the boxes packed one after another behind odd bytes."""
    fragments = []
    for rank, pieces in stored.items():
        file = f"rank-{rank}"
        for piece in pieces:
            data = files.setdefault(file, b"#" * 7)
            fragments.append(Fragment(piece.box, file, len(data)))
            files[file] = data + tensor[slices(piece.box)].tobytes()
    return fragments


def local_of(tensor: Array, pieces: tuple[Piece, ...], size: int) -> Array:
    local = np.full(size, -1, ITEM)
    for piece in pieces:
        for index in np.ndindex(*piece.box.shape):
            place = piece.start + int(np.dot(index, piece.strides))
            local[place] = tensor[tuple(np.add(index, piece.box.offsets))]
    return local


@st.composite
def shardings(draw: st.DrawFn, ndim: int) -> Sharding:
    mesh = Mesh((draw(st.integers(1, 4)), draw(st.integers(1, 3))), ("a", "b"))
    kinds = [Replicate(), Flat(), *[Shard(d) for d in range(ndim)], *[StridedShard(d, 3) for d in range(ndim)]]
    return Sharding(mesh, tuple(draw(st.sampled_from(kinds)) for _ in range(2)))


@settings(max_examples=200)
@given(data=st.data(), shapes=st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=3))
def test_any_layout_to_any_layout(data: st.DataObject, shapes: list[tuple[int, ...]]) -> None:
    files: dict[str, bytes] = {}
    wanted, targets, expected = [], [], []
    granule = data.draw(st.sampled_from([None, 16, 64]))
    for number, shape in enumerate(shapes):
        tensor = index_tensor(shape, 1000 * number)
        source, target = data.draw(shardings(len(shape))), data.draw(shardings(len(shape)))
        stored = {r: source.pieces(r, shape) for r in source.holders() if source.replica_index(r) == 0}
        fragments = store(tensor, stored, files)
        for rank in target.holders():
            pieces = target.pieces(rank, shape)
            wanted.append(Wanted(len(targets), f"w{number}", shape, 4, pieces, fragments))
            targets.append(np.full(math.prod(target.local_shape(rank, shape)), -1, ITEM))
            expected.append(local_of(tensor, pieces, targets[-1].size))

    def widen(fragment: Fragment, start: int, stop: int) -> tuple[int, int]:
        assert granule is not None
        end = fragment.offset + fragment.box.size * 4
        low = fragment.offset + (start - fragment.offset) // granule * granule
        return low, min(end, fragment.offset + -(-(stop - fragment.offset) // granule) * granule)

    limit = data.draw(st.sampled_from([8, 40, 1 << 20]))
    plan = plan_reads(wanted, widen=None if granule is None else widen, max_read_bytes=limit)
    carry_out(plan, files, targets)
    for number, (found, right) in enumerate(zip(targets, expected, strict=True)):
        assert found.tolist() == right.tolist(), wanted[number]
    assert plan.wanted_bytes == sum(4 * (right >= 0).sum() for right in expected)
    assert plan.read_bytes <= sum(map(len, files.values()))


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_strided_fragments_and_targets(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """Stored transposed, wanted transposed otherwise, with a stored scalar repeated."""
    tensor = index_tensor(shape)
    order = data.draw(st.permutations(range(len(shape))))
    stored = np.ascontiguousarray(tensor.transpose(order))
    strides = np.empty(len(shape), np.int64)
    strides[list(order)] = row_major_strides(stored.shape)
    files = {"f": stored.tobytes(), "one": np.int32(-7).tobytes()}
    fragment = Fragment(Box.whole(shape), "f", 0, tuple(strides.tolist()))
    back = data.draw(st.permutations(range(len(shape))))
    target_strides = np.empty(len(shape), np.int64)
    target_strides[list(back)] = row_major_strides([shape[d] for d in back])
    piece = Piece(Box.whole(shape), 0, tuple(target_strides.tolist()))
    repeated = Fragment(Box.whole(shape), "one", 0, (0,) * len(shape))
    targets = [np.full(tensor.size, -1, ITEM) for _ in range(2)]
    plan = plan_reads(
        [
            Wanted(0, "t", shape, 4, [piece], [fragment]),
            Wanted(1, "s", shape, 4, [Piece.packed(Box.whole(shape))], [repeated]),
        ]
    )
    carry_out(plan, files, targets)
    assert targets[0].tolist() == tensor.transpose(back).reshape(-1).tolist()
    assert set(targets[1].tolist()) == {-7}
    assert plan.read_bytes == tensor.nbytes + 4


def test_same_layout_is_direct_and_reads_every_byte_once() -> None:
    sharding = Sharding(Mesh((4,), ("dp",)), (Shard(0),))
    shape = (4096, 512)
    pieces = sharding.pieces(2, shape)
    fragments = [Fragment(sharding.pieces(r, shape)[0].box, f"rank-{r}", 100) for r in range(4)]
    plan = plan_reads([Wanted(0, "w", shape, 4, pieces, fragments)], max_read_bytes=1 << 20)
    assert [(read.file, read.nbytes) for read in plan.reads] == [("rank-2", 1 << 20)] * 2
    assert all(read.is_direct for read in plan.reads)
    assert plan.amplification == 1


def test_small_neighbours_are_one_read_and_large_ones_stay_direct() -> None:
    small = [
        Wanted(i, f"b{i}", (64,), 4, [Piece.packed(Box.whole((64,)))], [Fragment(Box.whole((64,)), "f", i * 300)])
        for i in range(100)
    ]
    assert [(read.offset, read.nbytes) for read in plan_reads(small).reads] == [(0, 99 * 300 + 256)]
    size = 1 << 20
    large = [
        Wanted(
            i,
            f"w{i}",
            (size,),
            4,
            [Piece.packed(Box.whole((size,)))],
            [Fragment(Box.whole((size,)), "f", i * 4 * size)],
        )
        for i in range(3)
    ]
    assert [read.is_direct for read in plan_reads(large).reads] == [True] * 3


@pytest.mark.parametrize(("run_bytes", "bound"), [(4 << 20, 1.02), (64 << 10, 1.25), (16 << 10, 2.0)])
def test_amplification_of_column_slices(run_bytes: int, bound: float) -> None:
    """Runs in the middle of a row-major fragment, granules of 16 KiB around them."""
    shape = (16, 5 * run_bytes // 2)
    fragment = Fragment(Box.whole(shape), "f", 4096)

    def widen(fragment: Fragment, start: int, stop: int) -> tuple[int, int]:
        granule = 16384
        return (
            fragment.offset + (start - fragment.offset) // granule * granule,
            fragment.offset + -(-(stop - fragment.offset) // granule) * granule,
        )

    for first in (0, run_bytes // 2 - 3, run_bytes):
        piece = Piece.packed(Box((0, first), (16, run_bytes)))
        plan = plan_reads([Wanted(0, "w", shape, 1, [piece], [fragment])], widen=widen)
        assert 1 <= plan.amplification <= bound
        assert len(plan.reads) <= 16


def test_two_wants_of_one_stored_range_share_its_reads() -> None:
    shape = (1000, 100)
    fragment = Fragment(Box.whole(shape), "f", 0)
    pieces = [Piece.packed(Box.whole(shape)), Piece.packed(Box((3, 0), (990, 100)))]
    plan = plan_reads([Wanted(i, "w", shape, 4, [p], [fragment]) for i, p in enumerate(pieces)], max_read_bytes=10_000)
    assert plan.read_bytes == 400_000
    assert max(read.nbytes for read in plan.reads) <= 10_000
    assert plan.amplification < 0.51


def test_missing_and_double_sources_are_refused_by_name() -> None:
    shape = (6, 4)
    top, bottom = Fragment(Box((0, 0), (3, 4)), "a", 0), Fragment(Box((4, 0), (2, 4)), "b", 0)
    want = Piece.packed(Box((1, 0), (4, 4)))
    with pytest.raises(LayoutError, match=r"'enc\.w'.*nothing covers \[3:4, 0:4\]"):
        plan_reads([Wanted(0, "enc.w", shape, 4, [want], [top, bottom])])
    with pytest.raises(LayoutError, match=r"nothing covers \[1:5, 0:4\]"):
        plan_reads([Wanted(0, "enc.w", shape, 4, [want], [])])
    middle = Fragment(Box((2, 0), (2, 4)), "c", 0)
    with pytest.raises(LayoutError, match=r"\[1:3, 0:4\] and \[2:4, 0:4\] overlap"):
        plan_reads([Wanted(0, "enc.w", shape, 4, [want], [top, middle, bottom])])
    with pytest.raises(LayoutError, match="overlap"):
        plan_reads(
            [Wanted(0, "enc.w", shape, 4, [Piece.packed(Box.whole(shape))], [Fragment(Box.whole(shape), "a", 0)] * 2)]
        )


@given(data=st.data())
def test_index_finds_what_a_scan_finds(data: st.DataObject) -> None:
    corner = st.tuples(st.integers(0, 20), st.integers(0, 20))
    extent = st.tuples(st.integers(0, 9), st.integers(0, 9))
    boxes = data.draw(st.lists(st.builds(Box, corner, extent), max_size=40))
    fragments = [Fragment(box, "f", i) for i, box in enumerate(boxes)]
    query = data.draw(st.builds(Box, corner, extent))
    found = FragmentIndex(fragments).overlapping(query)
    expected = [(f, f.box.intersect(query)) for f in fragments if f.box.intersect(query) is not None]
    assert sorted(found, key=lambda pair: pair[0].offset) == expected


def test_tens_of_thousands_of_fragments_within_a_second() -> None:
    n = 50_000
    shape = (n, 16)
    fragments = [Fragment(Box((i, 0), (1, 16)), f"rank-{i % 64}", 64 * (i // 64)) for i in range(n)]
    begin = time.process_time()
    plan = plan_reads([Wanted(0, "w", shape, 4, [Piece.packed(Box.whole(shape))], fragments)])
    assert time.process_time() - begin < 2
    assert plan.amplification == 1
    assert len(plan.reads) == 64
    many = [
        Wanted(i, f"w{i}", (16,), 4, [Piece.packed(Box.whole((16,)))], [Fragment(Box.whole((16,)), "f", 64 * i)])
        for i in range(n)
    ]
    begin = time.process_time()
    assert plan_reads(many).read_bytes == 64 * n
    assert time.process_time() - begin < 2


def test_many_pieces_against_many_fragments() -> None:
    """Row shards against a finer flat cut: a search each, not a scan each."""
    shape = (20_000, 8)
    source = Sharding(Mesh((5000,), ("dp",)), (Flat(),))
    fragments = [Fragment(piece.box, f"rank-{rank}", 0) for rank in range(5000) for piece in source.pieces(rank, shape)]
    target = Sharding(Mesh((4000,), ("dp",)), (Shard(0),))
    pieces = list(itertools.chain.from_iterable(target.pieces(rank, shape) for rank in range(4000)))
    begin = time.process_time()
    plan = plan_reads([Wanted(0, "w", shape, 4, pieces, fragments)])
    assert time.process_time() - begin < 3
    assert plan.read_bytes == 4 * math.prod(shape)
