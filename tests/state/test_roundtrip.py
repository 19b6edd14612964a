"""Any nested state: flatten, copy the bytes, fill another copy of the state."""

from __future__ import annotations

import enum
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from ckptengine.errors import UnsupportedValue, UnusableRequest
from ckptengine.state.dtypes import TORCH_DTYPES
from ckptengine.state.flatten import flatten
from ckptengine.state.sharded import PerRank

from .helpers import assert_same_state, same_bits, save

Pair = namedtuple("Pair", ["tensor", "number"])


class Mode(enum.Enum):
    TRAIN = "train"
    EVAL = "eval"


@dataclass
class Progress:
    step: int = 0
    best: float = float("inf")
    history: list[float] = field(default_factory=list)
    moment: torch.Tensor | None = None


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any dtype with distinct byte patterns."""
    tensor = torch.empty(shape, dtype=dtype)
    size = tensor.numel() * tensor.element_size()
    raw = (torch.arange(size) * 37 % (2 if dtype == torch.bool else 251)).to(torch.uint8)
    return raw.view(dtype).reshape(shape) if size else tensor


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_dtype(name):
    dtype = TORCH_DTYPES[name]
    source = {"t": filled(dtype, 3, 4), "scalar": filled(dtype), "empty": filled(dtype, 0, 5)}
    target = {key: torch.empty_like(part) for key, part in source.items()}
    before = dict(target)
    save(source).restore(target)
    for key in source:
        assert target[key] is before[key]
        assert same_bits(source[key], target[key])


def test_keys_of_every_kind():
    def make(base: int) -> dict[object, object]:
        def t(i: int) -> torch.Tensor:
            return torch.full((2,), base + i)

        return {
            "0": t(0),
            0: t(1),
            "a.b": t(2),
            "a": {"b": t(3), "b.c": t(4)},
            "a|b": t(5),
            "": t(6),
            "a\\": {"b": t(7)},
            (1, "x"): t(8),
            None: t(9),
            True: t(10),
            -1: t(11),
            "$": t(12),
            "\ud800": t(13),
            b"k": t(14),
            Mode.TRAIN: t(15),
            2.5: t(16),
            "list": [t(17), (t(18), {0: t(19)})],
        }

    source, target = make(100), make(0)
    assert len(save(source).data) == 20
    save(source).restore(target)
    assert_same_state(source, target)
    assert target[0][0] == 101
    assert target["list"][1][1][0][0] == 119


def test_nested_containers_keep_identity_and_type():
    def make(seed: int) -> dict[str, object]:
        full = seed > 0
        return {
            "empty": {},
            "list": [seed] * seed,
            "none": None if full else 5,
            "was_none": seed if full else None,
            "ordered": OrderedDict(b=seed, a=2),
            "default": defaultdict(list, {"x": [seed]} if full else {}),
            "counter": Counter("aab" if full else ""),
            "set": {seed, "x"},
            "deque": deque([seed], maxlen=3),
            "pair": Pair(torch.full((2,), seed), seed),
            "progress": Progress(seed, 0.5, [1.0] * seed, torch.full((), float(seed))),
            "mode": Mode.TRAIN if full else Mode.EVAL,
            "path": pathlib.PurePosixPath(f"/{seed}"),
            "tuple": (seed, [seed], {"x": torch.tensor(seed)}),
            "array": np.full(3, seed),
            "large": np.full((50, 50), seed, np.float32),
            "strings": np.array([str(seed) * 40] * 100),
            "scalar": np.float64(seed),
            "bytes": bytearray([seed]),
            "nested": {"a": {"b": {"c": [[], {}, ()]}}, "seed": seed},
            "dtype": torch.bfloat16 if full else None,
        }

    source, target = make(3), make(0)
    before = dict(target)
    inner = target["nested"]["a"], target["progress"].history
    save(source).restore(target)
    assert_same_state(source, target)
    for key in ("empty", "list", "ordered", "default", "counter", "set", "deque", "progress", "array", "nested"):
        assert target[key] is before[key], key
    assert target["nested"]["a"] is inner[0]
    assert target["progress"].history is inner[1]
    assert target["pair"].tensor is before["pair"].tensor
    assert target["default"].default_factory is list
    assert target["array"].tolist() == [3, 3, 3]
    assert target["large"].shape == (50, 50)
    assert (target["large"] == 3).all()
    assert target["strings"][99] == "3" * 40


def test_noncontiguous_overlapping_and_lazy_tensors():
    base = torch.arange(24.0).reshape(4, 6)
    source = {
        "t": base.t(),
        "column": base[:, 2],
        "step": base[::2, ::3],
        "expanded": torch.ones(1).expand(3, 2),
        "conj": (torch.ones(2, dtype=torch.complex64) * (1 + 2j)).conj(),
        "channels": torch.arange(48.0).reshape(2, 4, 3, 2).to(memory_format=torch.channels_last),
    }
    other = torch.zeros(4, 6)
    target = {
        "t": torch.zeros(4, 6).t(),
        "column": other[:, 2],
        "step": torch.zeros(4, 6)[::2, ::3],
        "expanded": torch.zeros(1).expand(3, 2),
        "conj": torch.zeros(2, dtype=torch.complex64).conj(),
        "channels": torch.zeros(2, 4, 3, 2),
    }
    save(source).restore(target)
    for key, part in source.items():
        assert torch.equal(part, target[key]), key
    assert target["conj"].is_conj()
    assert other[:, 2].tolist() == base[:, 2].tolist()
    assert other.sum() == base[:, 2].sum()


def test_tied_tensors_are_stored_once_and_stay_tied():
    shared = torch.arange(4.0)
    state = {"a": shared, "b": {"c": shared, "view": shared[:], "part": shared[1:]}, "d": shared.clone()}
    flat = flatten(state, random=False)
    assert [leaf.name for leaf in flat.tensors] == ["a", "b.part", "d"]
    assert flat.aliases == {"b.c": "a", "b.view": "a"}
    copy = torch.zeros(4)
    target = {"a": copy, "b": {"c": copy, "view": copy[:], "part": copy[1:]}, "d": torch.zeros(4)}
    save(state).restore(target)
    assert target["b"]["c"] is target["a"]
    assert_same_state(state, target)


def test_a_tie_that_only_one_side_has():
    shared = torch.arange(4.0)
    untied = {"a": torch.zeros(4), "b": torch.zeros(4)}
    save({"a": shared, "b": shared}).restore(untied)
    assert untied["a"].tolist() == untied["b"].tolist() == [0, 1, 2, 3]
    tied = {"a": shared, "b": shared}
    save({"a": torch.full((4,), 5.0), "b": torch.full((4,), 5.0)}).restore(tied)
    assert shared.tolist() == [5.0] * 4


def test_module_as_the_whole_state():
    a, b = nn.Linear(2, 3), nn.Linear(2, 3)
    flat = flatten(a, random=False)
    assert [leaf.name for leaf in flat.tensors] == ["weight", "bias"]
    save(a).restore(b)
    assert torch.equal(a.weight, b.weight)


def test_growing_lists_and_values_that_change_kind():
    queued = [torch.ones(2), torch.full((3,), 2.0)]
    source = {"queue": queued, "best": {"w": torch.ones(2)}, "x": 3, "lr": torch.tensor(0.5)}
    target = {"queue": [], "best": {}, "x": None, "lr": 0.1}
    queue = target["queue"]
    save(source).restore(target)
    assert_same_state(source, target)
    assert target["queue"] is queue
    longer = [torch.zeros(2), torch.zeros(3), torch.zeros(4)]
    shorter = {"queue": longer, "best": {"w": torch.zeros(2)}, "x": 0, "lr": None}
    first = shorter["queue"][0]
    save(source).restore(shorter)
    assert len(shorter["queue"]) == 2
    assert shorter["queue"][0] is first
    was_none = {"a": torch.ones(2)}
    save({"a": None}).restore(was_none)
    assert was_none == {"a": None}
    counter = {"n": torch.zeros(())}
    live = counter["n"]
    save({"n": 7}).restore(counter)
    assert counter["n"] is live
    assert live.item() == 7


def test_per_rank_values():
    source = {"all": 1, "mine": PerRank({"cursor": 3, "t": torch.ones(2)})}
    saved = save(source)
    assert list(saved.data) == [r"mine.t.\@0"]
    assert saved.values == {"mine": {"$": "per_rank"}, "all": 1}
    target = {"mine": PerRank({"cursor": 0, "t": torch.zeros(2)}), "all": 0}
    inner = target["mine"].value
    saved.restore(target)
    assert inner["cursor"] == 3
    assert inner["t"].tolist() == [1, 1]
    immutable = {"mine": PerRank(5)}
    save({"mine": PerRank(6)}).restore(immutable)
    assert immutable["mine"].value == 6


def test_per_rank_module_and_object():
    source, target = {"m": PerRank(nn.Linear(2, 2))}, {"m": PerRank(nn.Linear(2, 2))}
    save(source).restore(target)
    assert torch.equal(source["m"].value.weight, target["m"].value.weight)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "cannot be stored|quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "tensor subclass"),
        (nn.UninitializedParameter, "not initialised"),
        (lambda: torch.empty(2, dtype=torch.bits8), "cannot be stored"),
    ],
    ids=["meta", "sparse", "quantized", "nested", "lazy", "bits"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_bytes_are_refused_by_path(make, what):
    tensor = make()
    with pytest.raises(UnsupportedValue, match=rf"'a\.0'.*({what})"):
        flatten({"a": [tensor]}, random=False)


def test_a_scalar_is_no_state():
    with pytest.raises(UnusableRequest, match="a state is a dict"):
        flatten(5, random=False)


def test_nothing_is_copied():
    tensor = torch.zeros(3)
    (leaf,) = flatten({"t": tensor}, random=False).tensors
    tensor += 1
    assert leaf.tensor.tolist() == [1, 1, 1]
    assert not leaf.tensor.requires_grad


def test_eager_leaves_are_those_that_change_without_an_optimizer():
    model = nn.BatchNorm1d(2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    state = {"m": model, "o": optimizer, "a": np.zeros(5000), "t": torch.zeros(2), "n": torch.zeros(())}
    leaves = {leaf.name: leaf for leaf in flatten(state, random=False).tensors}
    eager = {name for name, leaf in leaves.items() if leaf.eager}
    buffers = {"m.running_mean", "m.running_var", "m.num_batches_tracked"}
    assert eager == buffers | {"o.weight.step", "o.bias.step", "a", "n"}
    owned = {name for name, leaf in leaves.items() if leaf.owners == (id(optimizer),)}
    assert owned == {"m.weight", "m.bias"} | {name for name in leaves if name.startswith("o.")}
