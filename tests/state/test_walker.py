"""A second flatten reuses the first where nothing structural changed, and never where something did."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from ckptengine.errors import UnsupportedValue
from ckptengine.state.flatten import flatten
from ckptengine.state.leaves import FlatState
from ckptengine.state.sharded import PerRank, Sharded
from ckptengine.state.walker import Walker

from .test_modules import Extra
from .test_objects import Loader
from .test_optimizers import Nested


def make() -> dict[str, object]:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Extra({"n": 1}))
    optimizer = torch.optim.Adam([{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.5}])
    nested = Nested(net[2].parameters())
    net[1](net[0](torch.randn(5, 3))).sum().backward()
    optimizer.step()
    nested.step()
    optimizer.state[net[0].bias]["note"] = None
    net[0].register_buffer("kept", torch.zeros(1))
    net[0].register_buffer("transient", torch.ones(1), persistent=False)
    tied = torch.ones(3)
    return {
        "model": net,
        "optims": [optimizer, nested],
        "sched": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "loader": PerRank(Loader()),
        "data": {"a": torch.zeros(2), "tied": [tied, tied], "n": 0, "array": np.zeros(3000)},
        "many": {str(i): torch.arange(4.0).reshape(2, 2) + i for i in range(9)},
        "square": torch.arange(9.0).reshape(3, 3),
        "mine": PerRank({"t": torch.zeros(2), "cursor": 0}),
        "shard": Sharded(torch.zeros(2), (4,), offset=(2,)),
    }


def equal(a: FlatState, b: FlatState) -> bool:
    if (a.values, a.rank_values, a.aliases, a.structure_key) != (b.values, b.rank_values, b.aliases, b.structure_key):
        return False
    for left, right in zip(a.tensors, b.tensors, strict=True):
        for field in ("name", "dtype", "global_shape", "sharding", "pieces", "role", "eager", "owners"):
            if getattr(left, field) != getattr(right, field):
                return False
        if not torch.equal(left.tensor, right.tensor):
            return False
        if not left.eager and left.tensor.data_ptr() != right.tensor.data_ptr():
            return False
    return True


def test_the_second_flatten_equals_a_full_one_and_shares_leaves():
    state = make()
    walker = Walker(state, random=False)
    first = walker.flatten()
    second = walker.flatten()
    assert equal(second, flatten(state, random=False))
    shared = sum(a is b for a, b in zip(first.tensors, second.tensors, strict=True))
    assert shared == len(first.tensors) - 3  # the arrays and tensors of loader and data are read anew


def test_without_objects_the_tuple_is_the_same():
    state = {"m": nn.Linear(2, 2), "n": 1}
    walker = Walker(state, random=False)
    first = walker.flatten()
    state["n"] = 2
    second = walker.flatten()
    assert second.tensors is first.tensors
    assert second.values == {"m": {"$": "module"}, "n": 2}


VALUES: dict[str, Callable[[dict], object]] = {
    "plain": lambda s: s["data"].update(n=5),
    "array": lambda s: s["data"]["array"].fill(3),
    "extra": lambda s: setattr(s["model"][2], "value", {"n": 2, "t": [1, 2]}),
    "hyper": lambda s: s["optims"][0].param_groups[1].update(lr=0.125),
    "scheduler": lambda s: (s["optims"][0].step(), s["sched"].step()),
    "loader": lambda s: next(iter(s["loader"].value)),
    "cursor": lambda s: s["mine"].value.update(cursor=9),
    "in place": lambda s: (s["data"]["a"].fill_(3), s["model"][0].weight.data.fill_(2)),
    "nested count": lambda s: s["optims"][1].step(),
    "step": lambda s: s["optims"][0].step(),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_read_anew(name):
    state = make()
    walker = Walker(state, random=False)
    before = walker.flatten()
    VALUES[name](state)
    after = walker.flatten()
    assert equal(after, flatten(state, random=False))
    assert after.structure_key == before.structure_key


def exchange_buffers(state: dict) -> None:
    linear = state["model"][0]
    linear.register_buffer("transient", linear.transient)
    linear.register_buffer("kept", linear.kept, persistent=False)


def replace_parameter(state: dict) -> None:
    state["model"][0].bias = nn.Parameter(torch.ones(3))
    state["optims"][0] = torch.optim.SGD([p for p in state["model"].parameters() if p.ndim])


STRUCTURE: dict[str, Callable[[dict], object]] = {
    "new key": lambda s: s["data"].update(b=torch.ones(1)),
    "removed key": lambda s: s["data"].pop("a"),
    "other tensor": lambda s: s["data"].update(a=torch.ones(2)),
    "other shape": lambda s: s["data"].update(a=torch.ones(3)),
    "untied": lambda s: s["data"]["tied"].__setitem__(1, torch.ones(3)),
    "tied": lambda s: s["data"].update(b=s["data"]["a"]),
    "array shape": lambda s: s["data"].update(array=np.zeros(4000)),
    "array small": lambda s: s["data"].update(array=np.zeros(4)),
    "storage": lambda s: setattr(s["model"][0].weight, "data", torch.ones(3, 3)),
    "dtype": lambda s: s["model"].double(),
    "turned": lambda s: s["square"].t_(),
    "turned weight": lambda s: setattr(s["model"][0].weight, "data", s["model"][0].weight.data.t()),
    "turned among many": lambda s: s["many"]["3"].t_(),
    "read otherwise": lambda s: setattr(s["square"], "data", s["square"].data.view(torch.int32)),
    "read otherwise among many": lambda s: setattr(s["many"]["3"], "data", s["many"]["3"].data.view(torch.int32)),
    "local tensor": lambda s: setattr(s["shard"], "tensor", torch.ones(2)),
    "swapped": lambda s: torch.utils.swap_tensors(s["data"]["a"], torch.ones(2)),
    "added module": lambda s: s["model"].append(nn.Linear(1, 1)),
    "replaced module": lambda s: s["model"].__setitem__(1, nn.BatchNorm1d(3)),
    "buffer": lambda s: s["model"].register_buffer("b", torch.ones(1)),
    "non-persistent": lambda s: s["model"][1]._non_persistent_buffers_set.add("running_mean"),
    "exchanged": exchange_buffers,
    "replaced parameter": replace_parameter,
    "value becomes state": lambda s: s["optims"][0].state[s["model"][0].bias].update(note=torch.ones(3)),
    "new state": lambda s: s["optims"][0].state[s["model"][0].bias].update(more=torch.ones(3)),
    "other state": lambda s: s["optims"][0].state[s["model"][0].bias].update(exp_avg=torch.ones(3)),
    "dropped state": lambda s: s["optims"][0].state.clear(),
    "new group": lambda s: s["optims"][0].add_param_group({"params": [s["model"][2].weight]}),
    "regrouped": lambda s: s["optims"][0].param_groups[0]["params"].reverse(),
    "other optimizer": lambda s: s["optims"].__setitem__(0, torch.optim.SGD(s["model"].parameters())),
    "hook": lambda s: s["model"].register_state_dict_post_hook(lambda m, sd, p, meta: sd.pop("0.bias") is None or None),
    "rank tensor": lambda s: s["mine"].value.update(t=torch.ones(5)),
    "shard": lambda s: s.update(shard=Sharded(torch.zeros(2), (4,), offset=(0,))),
    "model": lambda s: s.update(model=nn.Linear(1, 1), optims=[]),
    "tensor hyper": lambda s: s["optims"][0].param_groups[0].update(lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_structural_changes_are_seen(name):
    state = make()
    walker = Walker(state, random=False)
    before = walker.flatten()
    if name in ("model", "replaced module"):
        state["sched"] = None
    if name == "replaced module":
        state["optims"] = []
    STRUCTURE[name](state)
    if name == "hook":
        state["optims"] = []
    after = walker.flatten()
    assert equal(after, flatten(state, random=False))
    same_structure = {"other tensor", "storage", "swapped", "other state", "regrouped", "new group", "local tensor"}
    assert (after.structure_key == before.structure_key) == (name in same_structure or "turned" in name)
    assert equal(walker.flatten(), flatten(state, random=False))


def test_an_unsupported_value_is_found_the_second_time_too():
    state = make()
    walker = Walker(state)
    walker.flatten()
    state["data"]["n"] = object()
    with pytest.raises(UnsupportedValue, match=r"'data\.n'"):
        walker.flatten()
    state["data"]["n"] = 3
    assert ["n", 3] in dict(walker.flatten().values["items"])["data"]["items"]


def test_random_streams_are_captured_anew():
    walker = Walker({"x": 1})
    first = walker.flatten().rank_values["random"]
    torch.rand(1)
    assert walker.flatten().rank_values["random"] != first


def lazy(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors whose memory holds the conjugates or negatives of what they are."""
    return {"conj": value.conj(), "neg": value.conj().imag}


def first_of(flat: FlatState) -> torch.Tensor:
    return flat.tensors[0].tensor


@pytest.mark.parametrize("others", [0, 9])
@pytest.mark.parametrize("kind", ["conj", "neg"])
def test_elements_that_a_view_turns_are_read_anew(kind, others):
    memory = torch.complex(torch.arange(4.0), torch.ones(4))
    state = {kind: lazy(memory)[kind], **{str(i): torch.zeros(2) for i in range(others)}}
    walker = Walker(state, random=False)
    walker.flatten()
    memory.mul_(2)
    assert first_of(walker.flatten()).equal(state[kind].resolve_conj().resolve_neg())


@pytest.mark.parametrize("others", [0, 9])
@pytest.mark.parametrize("kind", ["conj", "neg"])
def test_a_parameter_that_becomes_such_a_view_of_its_memory_is_described_anew(kind, others):
    memory = torch.complex(torch.arange(4.0), torch.ones(4))
    parameter = nn.Parameter(memory.clone() if kind == "conj" else memory.imag)
    state = {"p": parameter, **{str(i): torch.zeros(2) for i in range(others)}}
    walker = Walker(state, random=False)
    walker.flatten()
    address = parameter.data_ptr()
    parameter.data = parameter.data.conj() if kind == "conj" else memory.conj().imag
    assert parameter.data_ptr() == address
    assert first_of(walker.flatten()).equal(parameter.data.resolve_conj().resolve_neg())


def test_a_second_flatten_is_much_faster():
    layers = nn.ModuleList([nn.Linear(1, 1) for _ in range(2500)])
    optimizer = torch.optim.Adam(layers.parameters(), foreach=True)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    walker = Walker({"model": layers, "optim": optimizer}, random=False)

    def timed() -> float:
        start = time.perf_counter()
        assert len(walker.flatten().tensors) == 20000
        return time.perf_counter() - start

    first = timed()
    assert min(timed() for _ in range(5)) < first / 5
