"""Plain values of other formats, offered to a live state: taken where they fit, and never a reason to fail."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
import torch
from torch import nn

from ckptengine.errors import StateMismatch
from ckptengine.state.fill import SavedState, prepare
from ckptengine.state.offered import Unfit, fitted


def training(lr: float = 0.01) -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(
        [{"params": net[0].parameters(), "weight_decay": 0.3}, {"params": net[1].parameters()}], lr=lr
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.5)
    return {"model": net, "optim": optimizer, "sched": scheduler, "epoch": 0, "log": {"loss": 0.0, "seen": 1}}


def saved(live: dict[str, Any], offered: object) -> SavedState:
    """A checkpoint of another format: the live weights, and values beside them."""
    tensors = {f"model.{n}": ("float32", tuple(p.shape)) for n, p in live["model"].named_parameters()}
    return SavedState(tensors=tensors, offered=offered)


def restore(live: dict[str, Any], offered: object, **options: Any) -> None:
    prepare(live, saved(live, offered), **options).commit()


def groups(**options: Any) -> list[dict[str, Any]]:
    return [{"params": ["0.weight", "0.bias", "1.weight", "1.bias"], **options}]


def test_options_schedulers_and_values_are_taken():
    done = training()
    for _ in range(2):
        done["optim"].step()
        done["sched"].step()
    live = training()
    log = live["log"]
    state = done["sched"].state_dict() | {"milestones": {"1": 1, "3": 1}}  # as DCP keeps keys that are numbers
    offered = {"optim": {"param_groups": groups(lr=0.7)}, "sched": state, "epoch": 3, "log": {"loss": 1.5, "new": 2}}
    restore(live, offered)
    assert [group["lr"] for group in live["optim"].param_groups] == [0.7, 0.7]
    assert [group["weight_decay"] for group in live["optim"].param_groups] == [0.3, 0]
    assert (live["sched"].last_epoch, live["sched"].milestones) == (2, Counter({1: 1, 3: 1}))
    assert live["epoch"] == 3
    assert live["log"] is log
    assert log == {"loss": 1.5, "seen": 1, "new": 2}


def test_groups_by_number_and_by_name():
    for params in ([["0", "1"], ["2", "3"]], [["0.weight", "0.bias"], ["1.weight", "1.bias"]]):
        live = training()
        rows = [{"params": row, "lr": lr, "params_were": row} for row, lr in zip(params, (0.5, 0.25), strict=True)]
        restore(live, {"optim": {"param_groups": rows}})
        assert [group["lr"] for group in live["optim"].param_groups] == [0.5, 0.25]
        assert "params_were" not in live["optim"].param_groups[0]


def test_options_that_differ_within_a_live_group_stay_as_they_are():
    live = training()
    rows = [{"params": ["0.weight", "1.weight"], "lr": 0.5, "momentum": 0.9}, {"params": ["0.bias"], "lr": 0.1}]
    restore(live, {"optim": {"param_groups": rows}})
    assert [group["lr"] for group in live["optim"].param_groups] == [0.01, 0.5]
    assert [group["momentum"] for group in live["optim"].param_groups] == [0, 0.9]


def test_an_optimizer_without_states_needs_only_its_groups():
    live = training()
    with pytest.raises(StateMismatch, match="has no state for this optimizer"):
        restore(live, {})
    restore(live, {"optim": {"param_groups": groups()}})


@pytest.mark.parametrize(
    "offered",
    [
        {"epoch": "three", "sched": {"last_epoch": 9}, "log": 5, "model": 3, "nothing": {"live": 1}},
        {"sched": [1, 2], "log": [1], "epoch": {"a": 1}},
        [1, 2],
        {"optim": {"param_groups": [{"params": ["0", "1"], "lr": 5.0}]}},
        {"optim": {"param_groups": "x", "state": 7}},
    ],
)
def test_what_does_not_fit_changes_nothing(offered: Any):
    live = training()
    if isinstance(offered, dict):
        offered["optim"] = offered.get("optim", {"param_groups": groups()})
    restore(live, offered, strict=False)
    assert live["epoch"] == 0
    assert live["sched"].last_epoch == 0
    assert live["log"] == {"loss": 0.0, "seen": 1}
    assert [group["lr"] for group in live["optim"].param_groups] == [0.01, 0.01]


def test_only_what_is_selected():
    live = training()
    offered = {"optim": {"param_groups": groups(lr=0.7)}, "epoch": 3, "log": {"loss": 1.5, "seen": 9}}
    restore(live, offered, names=["epoch", "log.loss"])
    assert live["epoch"] == 3
    assert live["log"] == {"loss": 1.5, "seen": 1}
    assert live["optim"].param_groups[0]["lr"] == 0.01


def test_counters_that_were_numbers():
    live = training()
    live["optim"] = torch.optim.Adam(live["model"].parameters())
    restore(live, {"optim": {"param_groups": groups(), "state": {"0.weight": {"step": 4, "odd": object()}}}})
    state = live["optim"].state[live["model"][0].weight]
    assert list(state) == ["step"]
    assert torch.equal(state["step"], torch.tensor(4.0))


def test_counts_are_exact_whatever_the_default_dtype_is():
    live, count = training(), 1_000_001
    torch.set_default_dtype(torch.bfloat16)
    try:
        restore(live, {"optim": {"param_groups": groups(), "state": {"0.weight": {"step": count}}}})
    finally:
        torch.set_default_dtype(torch.float32)
    assert live["optim"].state[live["model"][0].weight]["step"].item() == count


def test_a_rate_that_is_a_tensor():
    live = training()
    rate = torch.tensor(0.01)
    live["optim"] = torch.optim.Adam(live["model"].parameters(), lr=rate)
    restore(live, {"optim": {"param_groups": groups(lr=0.5)}})
    assert live["optim"].param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_extra_state_of_a_module():
    class Counting(nn.Linear):
        seen: Any = 0

        def get_extra_state(self) -> Any:
            return {"seen": self.seen}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state["seen"]

    live = {"model": Counting(2, 3)}
    restore(live, {"model": {"_extra_state": {"seen": 5}}})
    assert live["model"].seen == 5


@dataclasses.dataclass
class Progress:
    step: int = 0


@pytest.mark.parametrize(
    ("live", "new", "made"),
    [
        (None, 3, 3),
        (3, None, None),
        (1, 2.5, 2.5),
        ((1, 2), [3, 4, 5], (3, 4, 5)),
        ([], (1, 2), [1, 2]),
        (deque([1], 2), [1, 2], deque([1, 2], 2)),
        ({1: "a", "b": 2}, {"1": "c"}, {1: "c", "b": 2}),
        (Counter({1: 2}), {"1": 5}, Counter({1: 5})),
        (OrderedDict(a=1), {"a": 2}, OrderedDict(a=2)),
        ([{"n": (1,)}], [{"n": [2]}], [{"n": (2,)}]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 5}}, {"a": {"b": 5, "c": 2}}),
    ],
)
def test_kinds_of_containers_are_those_of_the_live_state(live: Any, new: Any, made: Any):
    found = fitted(live, new)
    assert found == made
    assert type(found) is type(made)


def test_a_default_factory_is_kept():
    found = fitted(defaultdict(list, a=[1]), {"a": [2]})
    assert (found, found["new"]) == ({"a": [2], "new": []}, [])


@pytest.mark.parametrize(
    ("live", "new"), [(1, "1"), (True, 1), (1, True), ("a", b"a"), ({}, [1]), ([], {}), (Progress(), {"step": 1})]
)
def test_other_kinds_are_refused(live: Any, new: Any):
    with pytest.raises(Unfit):
        fitted(live, new)
