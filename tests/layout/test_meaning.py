"""Meanings against building every rank's local tensors by hand with numpy, from index-valued logical tensors."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box
from ckptengine.layout.links import Link, Rearrangement
from ckptengine.layout.meaning import (
    arranged,
    averaged,
    concatenated,
    pipeline_places,
    renamed,
    stacked,
    tied,
    together,
    transposed,
)
from ckptengine.layout.segments import Arranged, Part, Segment, after, chunk, grouped, held_by_rank, padded
from ckptengine.layout.sharding import Flat, Mesh, Sharding
from ckptengine.layout.tensor import Fragment
from ckptengine.plan.read import ReadPlan, Wanted, plan_reads

Array = NDArray[np.int32]

HIDDEN, HEAD, QUERIES, VOCAB, LAYERS, EXPERTS, FFN = 6, 2, 12, 17, 4, 8, 12


@dataclass(frozen=True)
class Parallel:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    dp: int = 1
    kv_heads: int = 12


def logical_shapes(kv_heads: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embedding": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes[f"layers.{i}.qkv"] = ((QUERIES + 2 * kv_heads) * HEAD, HIDDEN)
        shapes[f"layers.{i}.proj"] = (HIDDEN, QUERIES * HEAD)
        shapes[f"layers.{i}.fc1"] = (2 * FFN, HIDDEN)
        shapes[f"layers.{i}.norm"] = (HIDDEN,)
        shapes[f"layers.{i}.experts"] = (EXPERTS, FFN, HIDDEN)
    shapes["steps"] = ()
    return shapes


def logical_tensors(kv_heads: int) -> dict[str, Array]:
    """Every element of every tensor has a value of its own."""
    tensors, first = {}, 1
    for name, shape in logical_shapes(kv_heads).items():
        size = math.prod(shape)
        tensors[name] = np.arange(first, first + size, dtype="<i4").reshape(shape)
        first += size
    return tensors


def share(array: Array, heads: int, tp: int, t: int) -> Array:
    """A rank's heads of one part, or the one head that it shares with its neighbours."""
    by_head = array.reshape(heads, -1, *array.shape[1:])
    mine = by_head[t * heads // tp : (t + 1) * heads // tp] if heads >= tp else by_head[[t * heads // tp]]
    return mine.reshape(-1, *array.shape[1:])


def locals_by_hand(tensors: dict[str, Array], how: Parallel) -> dict[str, Array]:
    made: dict[str, Array] = {}
    kv = how.kv_heads
    for t, p, e in itertools.product(range(how.tp), range(how.pp), range(how.ep)):
        where = f"t{t}p{p}e{e}/"
        rows = -(-VOCAB // (4 * how.tp)) * 4 * how.tp
        table = np.zeros((rows, HIDDEN), "<i4")
        table[:VOCAB] = tensors["embedding"]
        if p == 0:
            made[where + "embedding"] = np.split(table, how.tp)[t]
        if p == how.pp - 1:
            made[where + "output"] = np.split(table, how.tp)[t]
        made[where + "steps"] = tensors["steps"]
        per = LAYERS // (how.pp * how.vpp)
        for c, i in itertools.product(range(how.vpp), range(per)):
            layer = f"layers.{(c * how.pp + p) * per + i}."
            local = f"{where}chunk{c}.layers.{i}."
            q, k, v = np.split(tensors[layer + "qkv"], [QUERIES * HEAD, (QUERIES + kv) * HEAD])
            q, k, v = share(q, QUERIES, how.tp, t), share(k, kv, how.tp, t), share(v, kv, how.tp, t)
            groups = k.shape[0] // HEAD
            made[local + "qkv"] = np.concatenate(
                [
                    part
                    for g in range(groups)
                    for part in (np.split(q, groups)[g], np.split(k, groups)[g], np.split(v, groups)[g])
                ]
            )
            made[local + "proj"] = np.split(tensors[layer + "proj"], how.tp, axis=1)[t]
            gate, up = np.split(tensors[layer + "fc1"], 2)
            made[local + "fc1"] = np.concatenate([np.split(gate, how.tp)[t], np.split(up, how.tp)[t]])
            made[local + "norm"] = tensors[layer + "norm"]
            mine = EXPERTS // how.ep
            for j in range(mine):
                whole = tensors[layer + "experts"][e * mine + j]
                made[local + f"experts.{j}.w"] = np.split(whole, how.tp)[t].T
    return made


def rank_locals(how: Parallel) -> Rearrangement:
    """The same by meanings: from logical tensors to every rank's local ones."""
    shapes = logical_shapes(how.kv_heads)
    parts: list[Rearrangement] = []

    def add(source: str, target: str, dims: dict[int, Arranged], is_copy: bool) -> None:
        made = arranged(source, shapes[source], target, dims)
        parts.append(made.then(renamed(made.targets, {}, is_copy=True)) if is_copy else made)

    for t, p, e in itertools.product(range(how.tp), range(how.pp), range(how.ep)):
        where = f"t{t}p{p}e{e}/"
        vocabulary = padded(VOCAB, 4 * how.tp)
        rows = after(vocabulary, chunk(vocabulary.extent, how.tp, t))
        if p == 0:
            add("embedding", where + "embedding", {0: rows}, e > 0)
        if p == how.pp - 1:
            add("embedding", where + "output", {0: rows}, True)
        add("steps", where + "steps", {}, (t, p, e) != (0, 0, 0))
        for number, place in enumerate(pipeline_places(LAYERS, how.pp, how.vpp)):
            if place.stage != p:
                continue
            layer, local = f"layers.{number}.", f"{where}chunk{place.chunk}.layers.{place.index}."
            heads = [Part(n * HEAD, n) for n in (QUERIES, how.kv_heads, how.kv_heads)]
            mine = held_by_rank(heads, how.tp, t)
            groups = max(1, how.kv_heads // how.tp)
            widths = [QUERIES * HEAD // how.tp, groups * HEAD, groups * HEAD]
            add(layer + "qkv", local + "qkv", {0: after(mine, grouped(widths, groups))}, e > 0)
            add(layer + "proj", local + "proj", {1: chunk(QUERIES * HEAD, how.tp, t)}, e > 0)
            add(layer + "fc1", local + "fc1", {0: held_by_rank([Part(FFN), Part(FFN)], how.tp, t)}, e > 0)
            add(layer + "norm", local + "norm", {}, t > 0 or e > 0)
            dims = {0: chunk(EXPERTS, how.ep, e), 1: chunk(FFN, how.tp, t)}
            block = arranged(layer + "experts", shapes[layer + "experts"], "block", dims)
            count, rows_held, hidden = block.targets["block"]
            names = [local + f"experts.{j}.w" for j in range(count)]
            flipped = transposed("block", (count, rows_held, hidden), "flipped", (0, 2, 1))
            unstack = stacked(names, (hidden, rows_held), "flipped").inverse()
            parts.append(block.then(flipped).then(unstack))
    return together(parts)


def fill(plan: ReadPlan, files: dict[str, bytes], targets: list[Array]) -> None:
    for read in plan.reads:
        data = np.frombuffer(files[read.file][read.offset : read.offset + read.nbytes], np.uint8)
        for copy in read.copies:
            source = np.lib.stride_tricks.as_strided(
                data[copy.source_start : copy.source_start + 4].view("<i4"),
                copy.shape,
                [4 * s for s in copy.source_strides],
                writeable=False,
            )
            into = np.lib.stride_tricks.as_strided(
                targets[copy.target][copy.target_start :], copy.shape, [4 * s for s in copy.target_strides]
            )
            into[...] = source


KV = {1: [1, 2, 3, 4, 6, 12], 2: [1, 2, 4, 6, 12], 3: [1, 3, 6, 12], 4: [1, 2, 4, 12]}
PLACES = [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2)]


def cases() -> list[tuple[Parallel, Parallel]]:
    """Every tp, pp, ep and dp on both sides, in pairs drawn once for all."""
    draw = random.Random(4)
    found = []
    for _ in range(14):
        tps = draw.choice(range(1, 5)), draw.choice(range(1, 5))
        kv = draw.choice(sorted(set(KV[tps[0]]) & set(KV[tps[1]])))
        sides = [
            Parallel(tp, *draw.choice(PLACES), draw.choice([1, 2, 4, 8]), draw.choice([1, 2, 3, 4, 5, 7, 8]), kv)
            for tp in tps
        ]
        found.append((sides[0], sides[1]))
    return found


@pytest.mark.parametrize(("a", "b"), cases(), ids=lambda how: f"tp{how.tp}pp{how.pp}v{how.vpp}ep{how.ep}dp{how.dp}")
def test_ranks_of_a_fill_ranks_of_b(a: Parallel, b: Parallel) -> None:
    """Store A's local tensors, read them as logical ones, fill B's local tensors under a flat dp cut of each."""
    tensors = logical_tensors(a.kv_heads)
    to_a, to_b = rank_locals(a), rank_locals(b)
    to_a.prove_bijection()
    back = to_a.inverse()
    back.prove_complete()
    back.then(to_b).prove_bijection()

    stored = locals_by_hand(tensors, a)
    assert to_a.targets == {name: array.shape for name, array in stored.items()}
    files: dict[str, bytes] = {}
    places: dict[str, list[Fragment]] = {}
    for name, array in stored.items():
        file = name.split("/")[0]
        places[name] = [Fragment(Box.whole(array.shape), file, len(files.get(file, b"")))]
        files[file] = files.get(file, b"") + np.ascontiguousarray(array).tobytes()
    logical = {name: back.fragments(name, places.__getitem__, 4) for name in back.targets}

    expected = locals_by_hand(tensors, b)
    flat = Sharding(Mesh((b.dp,), ("dp",)), (Flat(),))
    wanted, targets, right = [], [], []
    for name, array in expected.items():
        for d in range(b.dp):
            held = flat.pieces(d, array.shape)
            (size,) = flat.local_shape(d, array.shape)
            for source, piece in to_b.pieces(name, held):
                shape = tensors[source].shape
                wanted.append(Wanted(len(targets), source, shape, 4, [piece], logical[source]))
            targets.append(np.zeros(size, "<i4"))
            first = min((piece.start for piece in held), default=0)
            assert first == 0
            part = -(-array.size // b.dp)
            right.append(array.reshape(-1)[d * part : (d + 1) * part])
    fill(plan_reads(wanted), files, targets)
    for found, array in zip(targets, right, strict=True):
        assert found.tolist() == array.tolist()


def test_local_tensors_are_copied_from_each_other_without_a_logical_detour() -> None:
    a, b = Parallel(2, 2, 1, 2, 1, 4), Parallel(4, 1, 2, 4, 1, 4)
    direct = rank_locals(a).inverse().then(rank_locals(b))
    tensors = logical_tensors(4)
    stored, expected = locals_by_hand(tensors, a), locals_by_hand(tensors, b)
    made = {name: np.zeros(shape, "<i4") for name, shape in direct.targets.items()}
    for link in direct.links:
        source = stored[link.source][tuple(map(slice, link.source_box.offsets, link.source_box.ends))]
        kept = [axis for axis in link.axes if axis is not None]
        source = source.reshape([n for d, n in enumerate(source.shape) if d in kept])
        source = source.transpose(np.argsort(np.argsort(kept)))
        box = link.target_box
        made[link.target][tuple(map(slice, box.offsets, box.ends))] = source.reshape(box.shape)
    assert {name: array.tolist() for name, array in made.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


@given(data=st.data())
def test_segments_against_numpy(data: st.DataObject) -> None:
    heads = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=3))
    unit = data.draw(st.integers(1, 3))
    ranks = data.draw(st.integers(1, 4))
    if any(0 < n < ranks and ranks % n for n in heads):
        with pytest.raises(LayoutError, match="neither"):
            [held_by_rank([Part(n * unit, n) for n in heads], ranks, rank) for rank in range(ranks)]
        return
    index = np.arange(sum(heads) * unit)
    parts = np.split(index, np.cumsum(heads)[:-1] * unit)
    originals: list[int] = []
    for rank in range(ranks):
        arranged_ = held_by_rank([Part(n * unit, n) for n in heads], ranks, rank)
        expected = []
        for n, part in zip(heads, parts, strict=True):
            if n >= ranks or n == 0:
                expected += np.array_split(part.reshape(-1, unit), ranks)[rank].reshape(-1).tolist()
            else:
                expected += part.reshape(n, unit)[rank * n // ranks].tolist()
        local = np.full(arranged_.extent, -1)
        for segment in arranged_.segments:
            taken = range(segment.source, segment.source + segment.length)
            local[segment.target : segment.target + segment.length] = taken
            originals += [] if segment.is_copy else taken
        assert local.tolist() == expected
    assert sorted(originals) == index.tolist()


def test_grouping_and_padding() -> None:
    made = grouped([4, 2, 2], 2)
    order = [i for s in made.segments for i in range(s.source, s.source + s.length)]
    assert order == [0, 1, 4, 6, 2, 3, 5, 7]
    assert padded(17, 8) == Arranged(24, (Segment(0, 0, 17),))
    assert [chunk(9, 4, r).extent for r in range(4)] == [3, 3, 3, 0]
    with pytest.raises(LayoutError, match="do not divide into 3 groups"):
        grouped([4, 2], 3)
    with pytest.raises(LayoutError, match="equal heads"):
        Part(7, 2)


def test_padding_is_stripped_and_made_again() -> None:
    to = arranged("w", (17, 3), "p", {0: padded(17, 8)})
    assert to.zeros == (("p", Box((17, 0), (7, 3))),)
    other = arranged("w", (17, 3), "q", {0: padded(17, 5)})
    both = to.inverse().then(other)
    both.prove_bijection()
    assert both.padding == (("p", Box((17, 0), (7, 3))),)
    assert both.zeros == (("q", Box((17, 0), (3, 3))),)
    again = to.inverse().inverse()
    assert (again.links, again.zeros, again.padding) == (to.links, to.zeros, to.padding)


def test_tied_and_averaged() -> None:
    shared = tied("embedding", (4, 2), ["input", "output"])
    shared.prove_bijection()
    back = shared.inverse()
    assert back.spares == (("output", Box.whole((4, 2))),)
    back.prove_bijection()
    mean = averaged(["rank0/b", "rank1/b", "rank2/b"], (5,), "b")
    mean.prove_complete()
    assert {link.term for link in mean.links} == {0, 1, 2}
    with pytest.raises(LayoutError, match="no bijection"):
        mean.prove_bijection()
    with pytest.raises(LayoutError, match="no inverse"):
        mean.inverse()
    split = mean.then(arranged("b", (5,), "local", {0: chunk(5, 2, 1)}))
    assert sorted((link.term, link.source, link.source_box.offsets) for link in split.links) == [
        (i, f"rank{i}/b", (3,)) for i in range(3)
    ]


def test_fusing_and_splitting() -> None:
    fuse = concatenated([("q", (4, 3)), ("k", (2, 3))], "qk")
    fuse.prove_bijection()
    assert fuse.targets == {"qk": (6, 3)}
    fuse.inverse().prove_bijection()
    with pytest.raises(LayoutError, match="does not fit behind"):
        concatenated([("q", (4, 3)), ("k", (2, 4))], "qk")


def test_pipeline_places() -> None:
    places = pipeline_places(8, 2, 2)
    assert [(p.stage, p.chunk, p.index) for p in places] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 0, 0),
        (1, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
        (1, 1, 0),
        (1, 1, 1),
    ]
    uneven = pipeline_places(5, 4, counts=[0, 3, 2, 0])
    assert [place.stage for place in uneven] == [1, 1, 1, 2, 2]
    with pytest.raises(LayoutError, match="do not divide"):
        pipeline_places(7, 2)
    with pytest.raises(LayoutError, match="do not place"):
        pipeline_places(7, 2, counts=[3, 3])


def test_what_is_lost_or_doubled_is_named() -> None:
    halves = [arranged("w", (6, 2), f"r{r}", {0: chunk(6, 2, r)}) for r in range(2)]
    together(halves).prove_bijection()
    with pytest.raises(LayoutError, match=r"'w'.*nothing covers \[3:6, 0:2\]"):
        halves[0].prove_bijection()
    doubled = together([*halves, arranged("w", (6, 2), "r2", {0: chunk(6, 2, 1)})])
    with pytest.raises(LayoutError, match=r"'w'.*overlap"):
        doubled.prove_bijection()
    back = halves[0].inverse()
    with pytest.raises(LayoutError, match=r"'w'.*nothing covers"):
        back.prove_complete()
    with pytest.raises(LayoutError, match="two re-arrangements make"):
        together([halves[0], halves[0]])
    with pytest.raises(LayoutError, match=r"of shape \(3, 3\) is wanted"):
        halves[0].then(renamed({"r0": (3, 3)}, {}))
    with pytest.raises(LayoutError, match="cannot be"):
        Link("a", Box.whole((2, 3)), "b", Box.whole((3,)), (1,))
    with pytest.raises(LayoutError, match="would be named"):
        renamed({"a": (1,), "b": (1,)}, {"a": "b"})
    with pytest.raises(LayoutError, match="which is no target"):
        Rearrangement({"a": (1,)}, {}, renamed({"a": (1,)}, {}).links).prove_complete()
