"""The restricted unpickler runs nothing, allocates nothing beyond its input, and fails with named errors only."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptengine.errors import CheckpointError, Damaged, UnreadableFormat
from ckptengine.sources.pickle_scan import end_of_pickle
from ckptengine.sources.plain import plain
from ckptengine.sources.unpickle import Placeholder, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=30,
)


class Runs:
    def __init__(self, function: Any, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@given(VALUES, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_plain_values_round_trip(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert end_of_pickle(data + b"more") == len(data)
    assert loads(data) == value
    assert plain(loads(data)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_run(tmp_path: Path, protocol: int) -> None:
    flag = tmp_path / "ran"
    attacks = [
        Runs(os.system, f"touch {flag}"),
        Runs(eval, f"open({str(flag)!r}, 'w')"),
        Runs(exec, f"open({str(flag)!r}, 'w')"),
        Runs(subprocess.check_call, ["touch", str(flag)]),
        Runs(getattr, os, "system"),
        Runs(Path.touch, flag),
    ]
    for attack in attacks[:4] + attacks[5:]:
        made = loads(pickle.dumps({"a": attack}, protocol))
        assert isinstance(made["a"], Placeholder)
        assert "not loaded" in repr(made["a"])
    assert not flag.exists()


def test_chains_of_reduce_and_build_run_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    body = b"\x80\x02cbuiltins\ngetattr\nq\x00(cos\nsystem\nX\x04\x00\x00\x00callt\x85R}X\x01\x00\x00\x00xK\x01sb."
    loads(body)
    dotted = (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93"
        + b"\x8c"
        + bytes([len(f"touch {flag}")])
        + f"touch {flag}".encode()
        + b"\x85R."
    )
    assert loads(dotted).class_name == "os.system"
    assert not flag.exists()


def test_objects_keep_what_the_pickle_says() -> None:
    class_ = collections.UserDict({"a": 1})
    made = loads(pickle.dumps(class_))
    assert made.class_name == "collections.UserDict"
    assert made.get("data") == {"a": 1}
    assert made.get("other", 5) == 5
    assert plain(made) == {"__class__": "collections.UserDict", "state": {"data": {"a": 1}}}


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # memo number far beyond the data
        b"\x80\x02Np2147483647\n.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",  # a byte string longer than the data
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
        b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"1.",
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",  # bytearray(2**31)
        b"\x80\x02cbuiltins\nlist\ncbuiltins\nrange\nJ\x00\x00\x00\x7f\x85R\x85R.",
        b"\x80\x02cbuiltins\nbytes\nJ\x00\x00\x00\x7f\x85R.",
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x05\x97.",  # out-of-band buffer
        b"\x80\x02}.trailing is fine"[:3],
        b"",
        b"\xff\xff",
        b"\x80\x02tu.",
        b"\x80\x02]K\x01(K\x02u.",
        b"\x80\x63N.",
    ],
)
def test_hostile_pickles_are_refused_at_once(body: bytes) -> None:
    with pytest.raises(CheckpointError, match="thing"):
        loads(body, what="thing")


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_never_raises_anything_else(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        plain(loads(b"\x80\x02" + data))


def test_storages_outside_of_a_torch_file_are_an_error() -> None:
    with pytest.raises(UnreadableFormat, match="storages"):
        loads(b"\x80\x02Nq\x00Q.")


def test_numpy_objects_are_not_read_but_do_not_stop_the_rest() -> None:
    data = pickle.dumps({"objects": np.array([{"a": 1}], dtype=object), "x": np.arange(3), "y": np.float64(2)}, 2)
    assert plain(loads(data))["objects"] == {"__class__": "numpy.ndarray of objects"}  # type: ignore[index]
    assert plain(loads(data))["x"].tolist() == [0, 1, 2]  # type: ignore[index]
    assert plain(loads(data))["y"] == 2.0  # type: ignore[index]


def test_sharing_does_not_multiply() -> None:
    value: list[Any] = []
    for _ in range(100):  # 2**100 leaves if sharing were expanded
        value = [value, value]
    made = plain(loads(pickle.dumps(value)))
    assert isinstance(made, list)
    assert made[0] is made[1]


def test_endless_values_are_an_error_or_end() -> None:
    value: list[Any] = []
    value.append(value)
    assert plain(loads(pickle.dumps(value))) == [None]
    deep = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
    with pytest.raises((UnreadableFormat, Damaged), match="deeper"):
        plain(loads(deep))
