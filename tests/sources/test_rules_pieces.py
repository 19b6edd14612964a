"""The ``pieces`` key of rules and the reshape beneath it, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import RuleError
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.rules.algebra import Placed, concatenate, narrow, reshape, transpose
from ckptengine.sources.rules.assemble import Assembler
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.parse import load_rules, parse_rules

from .memory import MemoryFiles, stored
from .reading import read_bytes

NAME = "decoder.layers.0.mlp.experts.weight1"


def array_of(files: Any, placed: Placed) -> np.ndarray:
    raw = read_bytes(files, LogicalTensor("t", placed.dtype, placed.shape, placed.fragments))
    return np.frombuffer(raw, placed.dtype).reshape(placed.shape)


def index_array(*shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


@settings(max_examples=80, deadline=None)
@given(
    factors=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    cuts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    turned=st.booleans(),
    data=st.data(),
)
def test_reshape_is_numpys(factors: list[int], cuts: tuple[int, int], turned: bool, data: st.DataObject) -> None:
    """A tensor that lies in pieces, some of them transposed, under every other shape of as many elements."""
    rows, columns = cuts[0] * 2, cuts[1] * int(np.prod(factors))
    whole = index_array(rows, columns)
    files = MemoryFiles()
    if turned:
        placed = transpose(stored(files, "t", np.ascontiguousarray(whole.T)), (1, 0))
    else:
        placed = (
            concatenate([stored(files, "a", whole[:2]), stored(files, "b", whole[2:])], 0)
            if rows > 2
            else stored(files, "a", whole)
        )
    start = data.draw(st.integers(0, columns - 1))
    placed, whole = narrow(placed, 1, start, columns - start), whole[:, start:]
    shape = data.draw(st.permutations([rows, columns - start, 1]))
    assert (array_of(files, reshape(placed, tuple(shape))) == whole.reshape(shape)).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_fused_experts_of_the_preset(tp: int, ep: int, gated: bool) -> None:
    """Each rank's [hidden, experts x width] is its experts' [hidden, width] one after another."""
    experts, hidden, width = 4, 5, 6
    first = index_array(experts, hidden, (2 if gated else 1) * width)
    second = -index_array(experts, width, hidden)
    values = {
        "args": {"num_experts": experts, "hidden_size": hidden, "swiglu": gated, "expert_model_parallel_size": ep}
    }
    files = MemoryFiles()
    rules, averages = load_rules("megatron-gpt"), AveragedFiles(files)
    other = NAME.replace("weight1", "weight2")
    assembler = Assembler(rules, [NAME, other], values, averages)
    for name, whole, fused in ((NAME, first, True), (other, second, False)):
        by_expert = []
        for number, mine in enumerate(np.split(whole, ep)):
            pieces = []
            for rank in range(tp):
                if fused:
                    halves = np.split(mine, 2 if gated else 1, axis=2)
                    part = np.concatenate([np.split(half, tp, axis=2)[rank] for half in halves], axis=2)
                    local = part.reshape(hidden, -1)
                else:
                    local = np.split(mine, tp, axis=1)[rank].reshape(-1, hidden)
                pieces.append(stored(files, f"{name}{number}.{rank}", np.ascontiguousarray(local)))
            by_expert.append(assembler.whole(name, pieces))
        assert (array_of(averages, assembler.whole_experts(name, by_expert)) == whole).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pieces = [2, -1, -1]\nshard = 0", "one -1 at most"),
        ("pieces = []\nshard = 0", "one -1 at most"),
        ("pieces = [2, 2]\nrename = 'b'", "needs shard"),
        ("pieces = 2\nshard = 0", "is not a list"),
    ],
)
def test_what_pieces_cannot_say(text: str, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        parse_rules(f"version = 1\n[[rule]]\nmatch = 'a'\n{text}", "test.toml")


def test_a_shape_that_does_not_fit() -> None:
    files = MemoryFiles()
    rules = parse_rules("version = 1\n[[rule]]\nmatch = 'a'\npieces = [4, -1]\nshard = 0", "test.toml")
    assembler = Assembler(rules, ["a"], {}, AveragedFiles(files))
    with pytest.raises(RuleError, match=r"\[3, 5\] does not have the shape \[4, -1\]"):
        assembler.whole("a", [stored(files, "a", index_array(3, 5))])
