"""The typed encoding read as plain values agrees with what was encoded."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import UnreadableFormat
from ckptengine.sources import typed
from ckptengine.sources.typed import decode_values
from ckptengine.state import collect, scalars
from ckptengine.state.decoding import DECODERS
from ckptengine.state.encoding import encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=30,
)  # fmt: skip


@dataclasses.dataclass
class Point:
    x: int


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_plain_values_round_trip(value: object) -> None:
    assert decode_values({"value": encode(value)}) == {"value": value}


def test_every_tag_of_the_encoder_is_known() -> None:
    assert scalars.DECODERS is DECODERS
    assert typed._TAGS.keys() == {*DECODERS, "tensor", "module", "optimizer", "object", "per_rank"}


def test_other_types_become_plain() -> None:
    value = {
        "size": torch.Size([1, 2]), "dtype": torch.bfloat16, "device": torch.device("cpu"),
        "path": pathlib.PurePosixPath("a/b"), "counter": collections.Counter("aab"), "array": np.arange(3),
        "number": np.float32(0.5), "set": {1}, "inf": float("inf"),
    }  # fmt: skip
    made: Any = decode_values(encode(value))
    assert made["array"].tolist() == [0, 1, 2]
    assert {key: item for key, item in made.items() if key != "array"} == {
        "size": (1, 2), "dtype": "torch.bfloat16", "device": "cpu", "path": "a/b", "counter": {"a": 2, "b": 1},
        "number": 0.5, "set": {1}, "inf": float("inf"),
    }  # fmt: skip


def test_a_live_state() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    state = {"model": model, "optim": optimizer, "sched": schedule, "note": [1, torch.ones(2)], "only": torch.ones(1)}
    made: Any = decode_values(collect.Collector().run(state).values)
    assert set(made) == {"optim", "sched", "note"}
    assert made["note"] == [1, None]
    assert made["optim"]["param_groups"][0]["params"] == ["weight", "bias"]
    assert made["optim"]["param_groups"][0]["lr"] == 0.5
    assert made["sched"]["step_size"] == 2


@pytest.mark.parametrize(
    "document", [{"$": "new"}, {"$": "int", "v": "zz"}, {"$": "tuple", "v": 5}, {"$": "bytes", "v": "?"}, {"$": []}]
)
def test_malformed_data(document: Any) -> None:
    with pytest.raises(UnreadableFormat):
        decode_values(document)
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    with pytest.raises(UnreadableFormat, match="deeper"):
        decode_values(deep)
