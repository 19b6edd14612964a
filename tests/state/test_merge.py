"""Values of several ranks: equal, or united where ranks hold different modules and parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptengine.errors import RanksDisagree
from ckptengine.state.decoding import decode
from ckptengine.state.encoding import encode
from ckptengine.state.flatten import flatten
from ckptengine.state.merge import merge_aliases, merge_values

from .helpers import MemoryCheckpoint, assert_same_state
from .test_modules import Extra


def test_equal_values_stay_as_they_are():
    data = encode({"b": 1, "a": [1, {"x": (1, 2)}]})
    assert merge_values([data, encode({"b": 1, "a": [1, {"x": (1, 2)}]})]) == data


def test_every_difference_is_named_with_its_ranks():
    base = {"epoch": 1, "nested": {"a.b": [1, 2], "same": 0}, "kind": 1, "t": (1, 2)}
    other = {"epoch": 2, "nested": {"a.b": [1, 3], "same": 0}, "kind": "x", "t": (1, 2, 3)}
    with pytest.raises(RanksDisagree) as caught:
        merge_values([encode(base), encode(base), encode(other)])
    for told in (
        "epoch is 1 on rank 0 and 2 on rank 2",
        "nested.a.b.1 is 2 on rank 0 and 3 on rank 2",
        'kind is 1 on rank 0 and "x" on rank 2',
        "t is ",
        "PerRank",
    ):
        assert told in str(caught.value)


def test_dicts_are_united_in_the_order_in_which_keys_are_met():
    merged = merge_values([encode({"z": 1, "a": {"x": 1}}), encode({"a": {"y": 2}, "b": 3, 5: 6})])
    assert list(decode(merged).items()) == [("z", 1), ("a", {"x": 1, "y": 2}), ("b", 3), (5, 6)]


def stage(part: int) -> dict[str, object]:
    """One stage of a pipeline of two: its own layer, the optimizer over it in two groups."""
    model = nn.ModuleDict({str(part): nn.Linear(2, 2), f"extra{part}": Extra({"stage": part})})
    layer = model[str(part)]
    groups = [{"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias] if part else [], "lr": 0.25}]
    optimizer = torch.optim.Adam(groups)
    for parameter in (layer.weight, layer.bias):
        parameter.grad = torch.full_like(parameter, part + 1.0)
    optimizer.step()
    return {"model": model, "optim": optimizer, "epoch": 7}


def test_pipeline_stages_become_one_checkpoint_and_any_rank_can_restore_its_part():
    flats = [flatten(stage(part), random=False) for part in (0, 1)]
    saved = MemoryCheckpoint(*flats)
    saved.values = merge_values([flat.values for flat in flats])
    whole = nn.ModuleDict({"0": nn.Linear(2, 2), "extra0": Extra(None), "1": nn.Linear(2, 2), "extra1": Extra(None)})
    groups = [{"params": [whole["0"].weight, whole["1"].weight]}, {"params": [whole["1"].bias]}]
    single = {"model": whole, "optim": torch.optim.Adam(groups), "epoch": 0}
    saved.restore(single)
    assert whole["extra1"].value == {"stage": 1}
    assert [group["lr"] for group in single["optim"].param_groups] == [0.5, 0.25]
    for part in (0, 1):
        source, target = stage(part), stage(part)
        save = MemoryCheckpoint(flatten(source, random=False))
        for name, tensor in save.data.items():
            saved.data[name] = tensor
        saved.restore(target, alone=False)
        assert_same_state(source, target)


def test_hyper_parameters_that_differ_are_named():
    first, second = stage(0), stage(1)
    second["optim"].param_groups[0]["lr"] = 0.75
    with pytest.raises(RanksDisagree, match=r"optim\.param_groups\.0\.lr is 0\.5 on rank 0 and 0\.75 on rank 1"):
        merge_values([flatten(state, random=False).values for state in (first, second)])


def test_a_different_number_of_groups_is_named():
    first, second = stage(0), stage(1)
    second["optim"].param_groups.pop()
    second["optim"].state.clear()
    with pytest.raises(RanksDisagree, match=r"optim has \[1, 2\] parameter groups"):
        merge_values([flatten(state, random=False).values for state in (first, second)])


def test_aliases_of_ranks():
    merged = merge_aliases([{"head": "embed"}, {}], [frozenset({"embed"}), frozenset({"other"})])
    assert merged == {"head": "embed"}
    # a pipeline that ties across stages: the last stage stores the head itself
    assert merge_aliases([{"head": "embed"}, {}], [frozenset({"embed"}), frozenset({"head"})]) == {}
