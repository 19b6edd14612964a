"""Runs of boxes and boxes of flat ranges against index-valued arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.piece import Piece, packed_pieces
from ckptengine.layout.runs import runs_of

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
solid_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, offsets, strict=True)))


def indices_of(box: Box, shape: tuple[int, ...]) -> list[int]:
    index = np.arange(math.prod(shape)).reshape(shape)
    return index[tuple(slice(a, b) for a, b in zip(box.offsets, box.ends, strict=True))].reshape(-1).tolist()


@given(data=st.data(), shape=shapes)
def test_runs_are_the_elements_of_the_box_and_maximal(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape))
    runs = runs_of(box, shape)
    expected = indices_of(box, shape)
    assert [i for start, length in runs for i in range(start, start + length)] == expected
    assert runs.size == box.size
    assert runs.count == len(runs.starts())
    breaks = sum(b != a + 1 for a, b in itertools.pairwise(expected))
    assert runs.count == (breaks + 1 if expected else 0)
    if expected:
        assert runs.stop == expected[-1] + 1
    assert all(count > 1 for count, _ in runs.loops)


def test_runs_merge_loops() -> None:
    runs = runs_of(Box((0, 0, 1), (2, 3, 2)), (5, 3, 4))
    assert (runs.first, runs.length, runs.loops) == (1, 2, ((6, 4),))


def test_runs_refuse_a_box_outside() -> None:
    with pytest.raises(LayoutError, match="does not lie inside"):
        runs_of(Box((1,), (4,)), (4,))


@given(data=st.data(), shape=solid_shapes)
def test_flat_range_is_few_contiguous_boxes_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    boxes = flat_boxes(shape, start, stop)
    assert [i for box in boxes for i in indices_of(box, shape)] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(runs_of(box, shape).count == 1 for box in boxes)


def test_flat_range_outside_is_refused() -> None:
    with pytest.raises(LayoutError, match="flat range 3:7"):
        flat_boxes((2, 3), 3, 7)
    assert flat_boxes((0, 3), 0, 0) == ()
    assert flat_boxes((), 0, 1) == (Box((), ()),)


def test_pieces() -> None:
    pieces = packed_pieces([Box((0, 2), (2, 2)), Box((1, 0), (1, 3))])
    assert [piece.start for piece in pieces] == [0, 4]
    assert pieces[0].is_contiguous
    assert pieces[0].part(Box((1, 3), (1, 1))) == Piece(Box((1, 3), (1, 1)), 3, (2, 1))
    assert not Piece(Box((0, 0), (2, 2)), 0, (3, 1)).is_contiguous
    assert pieces[1].size == 3
