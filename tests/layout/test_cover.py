"""The cover proof against counting every element."""

from __future__ import annotations

import itertools
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.cover import prove_cover, prove_cover_arrays, prove_layout
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.piece import Piece
from ckptengine.layout.sharding import Flat, Irregular, Mesh, Partial, Replicate, Shard, Sharding


def cut_up(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """A random guillotine partition."""
    dims = [d for d, n in enumerate(box.shape) if n > 1]
    if depth == 0 or not dims:
        return [box]
    d = draw(st.sampled_from(dims))
    at = draw(st.integers(1, box.shape[d] - 1))
    lower = Box(box.offsets, (*box.shape[:d], at, *box.shape[d + 1 :]))
    upper = box.subtract(lower)[0]
    return [*cut_up(draw, lower, depth - 1), *cut_up(draw, upper, depth - 1)]


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    boxes = cut_up(draw, Box.whole(shape), draw(st.integers(0, 5)))
    return shape, draw(st.permutations(boxes))


def counts(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    hits = np.zeros(shape, np.int64)
    for box in boxes:
        hits[tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))] += 1
    return hits


def boxes_named_in(message: str) -> list[Box]:
    found = []
    for text in re.findall(r"\[([\d:, ]*)\]", message):
        spans = [tuple(map(int, part.split(":"))) for part in text.split(", ")] if text else []
        found.append(Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans)))
    return found


@settings(max_examples=300)
@given(case=partitions(), data=st.data())
def test_any_defect_is_found_with_a_true_witness(case: tuple[tuple[int, ...], list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    prove_cover("w", shape, boxes)
    boxes = list(boxes)
    victim = data.draw(st.integers(0, len(boxes) - 1))
    match data.draw(st.sampled_from(["drop", "double", "grow", "shrink"])):
        case "drop":
            del boxes[victim]
        case "double":
            boxes.append(boxes[victim])
        case how:
            box = boxes[victim]
            if not shape:
                return
            d = data.draw(st.integers(0, len(shape) - 1))
            n = box.shape[d] + (1 if how == "grow" else -1)
            boxes[victim] = Box(box.offsets, (*box.shape[:d], n, *box.shape[d + 1 :]))
            if boxes[victim].ends[d] > shape[d]:
                with pytest.raises(LayoutError, match="out of bounds"):
                    prove_cover("w", shape, boxes)
                return
    with pytest.raises(LayoutError, match=r"tensor 'w'") as caught:
        prove_cover("w", shape, boxes)
    hits = counts(shape, boxes)
    named = boxes_named_in(str(caught.value))
    if "nothing covers" in str(caught.value):
        assert counts(shape, named).sum() > 0
        assert hits[counts(shape, named) > 0].max() == 0
    else:
        common = named[0].intersect(named[1])
        assert common is not None
        assert hits[counts(shape, [common]) > 0].min() >= 2


def test_pinwheel_has_no_separating_line() -> None:
    ring = [Box((0, 0), (1, 2)), Box((0, 2), (2, 1)), Box((2, 1), (1, 2)), Box((1, 0), (2, 1)), Box((1, 1), (1, 1))]
    prove_cover("w", (3, 3), ring)
    tiles = [box.shift((3 * i, 3 * j)) for i in range(4) for j in range(4) for box in ring]
    prove_cover("w", (12, 12), tiles)
    with pytest.raises(LayoutError, match=r"nothing covers \[7:8, 4:5\]"):
        prove_cover("w", (12, 12), [box for box in tiles if box != Box((7, 4), (1, 1))])
    with pytest.raises(LayoutError, match="overlap"):
        prove_cover("w", (12, 12), [*tiles, Box((7, 4), (1, 1))])


def test_empty_and_scalar_tensors() -> None:
    prove_cover("w", (0, 3), [])
    prove_cover("w", (0, 3), [Box((0, 0), (0, 3))])
    prove_cover("w", (), [Box((), ())])
    prove_cover("w", (3,), [Box((0,), (3,)), Box((3,), (0,))])
    with pytest.raises(LayoutError, match="nothing covers"):
        prove_cover("w", (), [])
    with pytest.raises(LayoutError, match="overlap"):
        prove_cover("w", (), [Box((), ())] * 2)
    with pytest.raises(LayoutError, match="out of bounds"):
        prove_cover("w", (0, 3), [Box((0, 0), (1, 3))])
    with pytest.raises(LayoutError, match="1 dimensions"):
        prove_cover("w", (2, 2), [Box((0,), (4,))])


def test_hostile_numbers() -> None:
    with pytest.raises(LayoutError, match="more than"):
        prove_cover("w", (1 << 40, 1 << 40), [])
    with pytest.raises(LayoutError, match="beyond"):
        prove_cover("w", (4,), [Box((1 << 70,), (1,))])
    far = np.array([[np.iinfo(np.int64).max]])
    with pytest.raises(LayoutError, match="out of bounds"):
        prove_cover_arrays("w", (4,), far, far)


def test_a_hundred_thousand_boxes_in_well_under_a_second() -> None:
    n = 100_000
    rows = np.arange(n, dtype=np.int64)[:, None] * np.array([3, 0])
    begin = time.process_time()
    prove_cover_arrays("rows", (3 * n, 64), rows[::-1], np.tile([3, 64], (n, 1)))
    grid = np.stack(np.meshgrid(np.arange(400), np.arange(250), indexing="ij"), axis=-1).reshape(-1, 2)
    prove_cover_arrays("grid", (1600, 1000), grid * 4, np.full_like(grid, 4))
    thin = np.stack(np.meshgrid(np.arange(n // 2), np.arange(2), indexing="ij"), axis=-1).reshape(-1, 2)
    prove_cover_arrays("thin", (2 * n, 6), thin * np.array([4, 3]), np.tile([4, 3], (n, 1)))
    assert time.process_time() - begin < 2
    with pytest.raises(LayoutError, match=r"nothing covers \[150000:150003, 0:64\]"):
        prove_cover_arrays("rows", (3 * n, 64), np.delete(rows, 50_000, 0), np.tile([3, 64], (n - 1, 1)))


def test_flat_ranges_are_proven_as_a_line() -> None:
    shape = (40, 30, 20)
    cuts = [0, 1, 17, 600, 6001, 23_999, 24_000]
    boxes = [box for a, b in itertools.pairwise(cuts) for box in flat_boxes(shape, a, b)]
    prove_cover("w", shape, boxes)
    for i in range(len(boxes)):
        with pytest.raises(LayoutError, match="nothing covers"):
            prove_cover("w", shape, boxes[:i] + boxes[i + 1 :])


def test_layouts() -> None:
    mesh = Mesh((100, 100), ("dp", "tp"))
    prove_layout("w", (7, 9), Sharding(mesh, (Shard(0), Shard(1))))
    prove_layout("w", (7, 9), Sharding(mesh, (Flat(), Replicate())))
    prove_layout("w", (7, 9), Sharding(mesh, (Flat(offset=5, part=1), Flat(offset=5, part=1))))
    with pytest.raises(LayoutError, match="partial"):
        prove_layout("w", (7, 9), Sharding(mesh, (Shard(0), Partial())))
    with pytest.raises(LayoutError, match="100 flat parts of 1 elements"):
        prove_layout("w", (17, 9), Sharding(mesh, (Flat(part=1), Replicate())))
    with pytest.raises(LayoutError, match="does not fit"):
        prove_layout("w", (17,), Sharding(mesh, (Shard(0), Shard(1))))
    left, right = Box((0,), (2,)), Box((2,), (3,))
    held = ((0, (Piece.packed(left),)), (1, (Piece.packed(left),)), (4, (Piece.packed(right),)))
    prove_layout("w", (5,), Irregular(held))
    with pytest.raises(LayoutError, match=r"nothing covers \[5:6\]"):
        prove_layout("w", (6,), Irregular(held))


def test_within_a_box_names_things_in_the_tensors_own_coordinates() -> None:
    parts = [Box((4, 6), (1, 4)), Box((5, 6), (2, 3)), Box((5, 9), (2, 1))]
    within = Box((4, 6), (3, 4))
    prove_cover("w", (10, 10), parts, within=within)
    prove_cover("w", (10, 10), [within], within=within)
    with pytest.raises(LayoutError, match=r"nothing covers \[5:7, 9:10\]"):
        prove_cover("w", (10, 10), parts[:2], within=within)
    with pytest.raises(LayoutError, match=r"\[5:7, 9:10\] and \[5:7, 9:10\] overlap"):
        prove_cover("w", (10, 10), [*parts, parts[2]], within=within)
    with pytest.raises(LayoutError, match=r"\[3:5, 6:10\] is out of bounds \[4:7, 6:10\]"):
        prove_cover("w", (10, 10), [Box((3, 6), (2, 4)), *parts[1:]], within=within)
