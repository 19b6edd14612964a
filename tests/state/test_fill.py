"""Restoring: every difference at once, nothing changed before; partial, lenient and foreign restores."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ckptengine.errors import NotFound, StateMismatch, UnusableRequest
from ckptengine.state.encoding import encode
from ckptengine.state.fill import SavedState, prepare
from ckptengine.state.flatten import flatten

from .helpers import MemoryCheckpoint, assert_same_state, save


def make(value: float, steps: int = 1) -> dict[str, object]:
    torch.manual_seed(int(value))
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=value)
    for _ in range(steps):
        net(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    return {
        "model": net,
        "optim": optimizer,
        "sched": torch.optim.lr_scheduler.StepLR(optimizer, 3),
        "data": {"t": torch.full((2,), value), "n": value},
        "note": [value],
    }


def frozen(state: dict[str, object]) -> MemoryCheckpoint:
    return copy.deepcopy(save(state))


def same(a: MemoryCheckpoint, b: MemoryCheckpoint) -> bool:
    return a.values == b.values and all(torch.equal(a.data[name], b.data[name]) for name in a.data)


def foreign(tensors: dict[str, torch.Tensor], values: object = None) -> MemoryCheckpoint:
    """A checkpoint of a source that records tensors by canonical name and, at most, some values."""
    made = save(tensors)
    made.data = {name.replace("\\.", "."): part for name, part in made.data.items()}
    made.dtypes = {name.replace("\\.", "."): part for name, part in made.dtypes.items()}
    made.aliases = {a.replace("\\.", "."): b.replace("\\.", ".") for a, b in made.aliases.items()}
    made.values = None if values is None else encode(values)
    made.rank_values = [None]
    return made


def test_all_differences_are_reported_at_once_and_nothing_changes():
    saved = save(make(1.0))
    live = make(2.0)
    live["model"] = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(3).double(), nn.Linear(1, 1))
    live["optim"] = torch.optim.AdamW(live["model"].parameters())
    live["sched"] = torch.optim.lr_scheduler.ExponentialLR(live["optim"], 0.9)
    live["data"] = {"t": torch.zeros(2), "other": torch.zeros(1)}
    live["extra"] = 5
    del live["note"]
    before = frozen(live)
    with pytest.raises(StateMismatch) as caught:
        saved.restore(live)
    assert same(before, save(live))
    assert set(caught.value.problems) >= {
        "model.0.weight: shape (3, 2) in the checkpoint, (4, 2) live",
        "model.0.bias: shape (3,) in the checkpoint, (4,) live",
        "model.1.weight: dtype float32 in the checkpoint, float64 live",
        "model.2.weight: in the live state, not in the checkpoint",
        "optim.2.weight: this parameter was not in the saved optimizer",
        "sched: StepLR in the checkpoint, ExponentialLR live",
        "data.other: in the live state, not in the checkpoint",
        "data.n: in the checkpoint, not in the live state",
        "extra: in the live state, not in the checkpoint",
        "note: in the checkpoint, not in the live state",
    }
    assert "differences):\n  " in str(caught.value)
    assert "strict=False" in str(caught.value)


def test_preparing_changes_nothing():
    saved, live = save(make(1.0)), make(2.0, steps=0)
    before = frozen(live)
    filling = prepare(live, saved.saved())
    assert same(before, save(live))
    assert not live["optim"].state
    assert {target.name for target in filling.targets} == set(saved.data)


def test_strict_false_leaves_out_what_is_missing_or_extra():
    saved, live = save(make(1.0)), make(2.0)
    live["model"].append(nn.Linear(1, 1))
    live["new"], live["data"]["more"] = torch.full((1,), 7.0), 8
    del live["note"]
    filling = saved.restore(live, strict=False)
    assert live["new"] == 7
    assert live["data"]["more"] == 8
    assert live["data"]["t"].tolist() == [1, 1]
    assert filling.unused == ("note",)
    live["data"]["t"] = torch.zeros(3)
    with pytest.raises(StateMismatch, match=r"\(1 difference\)"):
        saved.restore(live, strict=False)


def test_not_alone_means_that_other_ranks_may_use_the_rest():
    saved = save({"a": torch.ones(1), "b": torch.ones(1), "v": 1})
    live = {"a": torch.zeros(1)}
    with pytest.raises(StateMismatch, match="b: in the checkpoint"):
        saved.restore(live)
    assert saved.restore(live, alone=False).unused == ("b", "v")
    assert live["a"] == 1


# parts


def test_names_select_prefixes_and_globs():
    saved = save(make(1.0))
    live = make(2.0)
    untouched = frozen(live)
    saved.restore(live, names=["model"])
    expected = make(1.0)
    assert_same_state(live["model"], expected["model"])
    now = save(live)
    for name in now.data:
        if not name.startswith("model."):
            assert torch.equal(now.data[name], untouched.data[name]), name
    assert now.values == untouched.values

    live = make(2.0)
    filling = saved.restore(live, names=["optim.*.exp_avg", "data.n"])
    assert sorted({target.name.rpartition(".")[2] for target in filling.targets}) == ["exp_avg"]
    assert live["data"]["n"] == 1.0
    assert live["data"]["t"].tolist() == [2, 2]
    assert live["note"] == [2.0]
    assert live["optim"].param_groups[0]["lr"] == 2.0

    live = make(2.0)
    saved.restore(live, names=["model.0.weight", "sched"])
    assert torch.equal(live["model"][0].weight, expected["model"][0].weight)
    assert not torch.equal(live["model"][0].bias, expected["model"][0].bias)


def test_names_do_not_match_halves_of_components():
    saved = save({"ab": torch.ones(1), "a": torch.ones(1)})
    live = {"ab": torch.zeros(1), "a": torch.zeros(1)}
    saved.restore(live, names=["a"])
    assert (live["a"].item(), live["ab"].item()) == (1, 0)


def test_names_that_select_nothing_are_refused():
    saved = save(make(1.0))
    with pytest.raises(NotFound, match="selects nothing"):
        saved.restore(make(2.0), names=["modle"])
    for bad in ("model", [], [""], [5]):
        with pytest.raises(UnusableRequest, match="names="):
            saved.restore(make(2.0), names=bad)


def test_a_part_ignores_what_is_missing_elsewhere():
    saved = save({"model": nn.Linear(2, 2)})
    live = {"model": nn.Linear(2, 2), "head": nn.Linear(3, 3), "x": 1}
    saved.restore(live, names=["model"])
    with pytest.raises(StateMismatch, match=r"head: in the live state"):
        saved.restore(live, names=["head"])


# foreign sources


def weights(net: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {f"model.{name}": part.detach().to(dtype) for name, part in net.named_parameters()}


def test_weights_of_a_foreign_checkpoint():
    source, live = nn.Linear(2, 3), nn.Linear(2, 3)
    foreign(weights(source, torch.float32)).restore({"model": live, "note": "kept"})
    assert torch.equal(live.weight, source.weight)


def test_a_foreign_checkpoint_without_the_optimizer_is_a_problem():
    live = nn.Linear(2, 3)
    state = {"model": live, "optim": torch.optim.SGD(live.parameters())}
    saved = foreign(weights(nn.Linear(2, 3), torch.float32))
    with pytest.raises(StateMismatch, match="optim: the checkpoint has no state for this optimizer"):
        saved.restore(state)
    saved.restore(state, names=["model"])


def foreign_training(step_dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    net = nn.Linear(2, 3)
    tensors = weights(net, torch.bfloat16)
    for name, part in net.named_parameters():
        tensors[f"optim.{name}.master"] = part.detach()
        tensors[f"optim.{name}.exp_avg"] = torch.rand_like(part)
        tensors[f"optim.{name}.exp_avg_sq"] = torch.rand_like(part)
        tensors[f"optim.{name}.step"] = torch.tensor(3, dtype=step_dtype)
    return tensors


def test_fp32_parameters_are_filled_from_masters():
    tensors = foreign_training()
    live = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(live.parameters())
    filling = foreign(tensors).restore({"model": live, "optim": optimizer})
    assert filling.unused == ()
    assert torch.equal(live.weight, tensors["optim.weight.master"])
    state = optimizer.state[live.weight]
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
    assert torch.equal(state["exp_avg"], tensors["optim.weight.exp_avg"])
    assert (state["step"].dtype, state["step"].item()) == (torch.float32, 3)
    live(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_masters_without_a_live_optimizer():
    tensors = foreign_training()
    live = nn.Linear(2, 3)
    foreign(tensors).restore({"model": live}, alone=False)
    assert torch.equal(live.bias, tensors["optim.bias.master"])


def test_low_precision_parameters_take_the_stored_weights():
    tensors = foreign_training()
    live = nn.Linear(2, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(live.parameters())
    filling = foreign(tensors).restore({"model": live, "optim": optimizer})
    assert torch.equal(live.weight, tensors["model.weight"])
    assert optimizer.state[live.weight]["exp_avg"].dtype == torch.float32
    assert "master" not in optimizer.state[live.weight]
    assert filling.unused == ()


def test_a_counter_of_another_dtype_is_converted_in_place():
    live = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(live.parameters())
    live(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    step = optimizer.state[live.weight]["step"]
    foreign(foreign_training()).restore({"model": live, "optim": optimizer})
    assert optimizer.state[live.weight]["step"] is step
    assert (step.item(), step.dtype) == (3.0, torch.float32)


def test_groups_and_values_of_a_foreign_checkpoint():
    groups = [{"lr": 0.5, "weight_decay": 0.0, "params": ["bias"]}, {"lr": 0.25, "params": ["weight"]}]
    saved = foreign(foreign_training(), {"optim": {"param_groups": groups, "state": {}}, "epoch": 7})
    live = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([{"params": [live.weight]}, {"params": [live.bias]}])
    state = {"model": live, "optim": optimizer, "epoch": 0}
    saved.restore(state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert state["epoch"] == 7


def test_an_alias_reads_its_owners_bytes():
    shared = torch.rand(3)
    saved = save({"a": shared, "b": shared})
    live = {"b": torch.zeros(3)}
    filling = saved.restore(live, alone=False)
    assert torch.equal(live["b"], shared)
    assert filling.unused == ()


# what was saved as another kind


def test_kinds_that_do_not_fit_are_named():
    saved = save({"m": 1, "o": 2, "d": 3, "l": 4, "s": {"x": 1}})
    net = nn.Linear(1, 1)
    live = {"m": net, "o": torch.optim.SGD(net.parameters()), "d": {"t": torch.ones(1)}, "l": [torch.ones(1)]}
    with pytest.raises(StateMismatch) as caught:
        saved.restore(live | {"s": (torch.ones(1),)})
    assert caught.value.problems == (
        "m: a module live, a plain value in the checkpoint",
        "o: an optimizer live, a plain value in the checkpoint",
        "d: a mapping with tensors or objects live, another kind in the checkpoint",
        "l: a sequence with tensors or objects live, another kind in the checkpoint",
        "s: a sequence with tensors or objects live, another kind in the checkpoint",
    )


def test_a_saved_module_needs_a_live_one():
    with pytest.raises(StateMismatch, match="saved module has no live counterpart"):
        save({"m": nn.Linear(1, 1)}).restore({"m": None})


@dataclass
class Unknown:
    x: int


def test_a_type_that_is_not_known_here_is_a_problem():
    saved = save({"p": Unknown(1)})
    with pytest.raises(StateMismatch, match=r"p: holds a .*:Unknown, not known here; call ckptengine.register"):
        saved.restore({"p": None})
    live = {"p": Unknown(2)}
    before = live["p"]
    saved.restore(live)
    assert live["p"] is before
    assert before.x == 1


@dataclass
class TrainState:
    net: nn.Module
    step: int


def test_a_dataclass_that_holds_a_module():
    source, target = TrainState(nn.Linear(2, 2), 5), TrainState(nn.Linear(2, 2), 0)
    net = target.net
    save({"s": source}).restore({"s": target})
    assert target.net is net
    assert target.step == 5
    assert torch.equal(net.weight, source.net.weight)


def test_saved_values_without_the_tensor_they_name():
    saved = save({"d": {}, "q": [torch.ones(1)]}).saved()
    broken = SavedState({}, {}, saved.values, saved.rank_values)
    with pytest.raises(StateMismatch, match=r"q\.0: the checkpoint's values name this tensor"):
        prepare({"d": {}, "q": []}, broken)


def test_a_second_flatten_after_restore_has_the_same_structure():
    source, target = make(1.0), make(2.0, steps=0)
    save(source).restore(target)
    assert flatten(source, random=False).structure_key == flatten(target, random=False).structure_key


def test_tensors_on_meta_are_reported_beside_everything_else():
    saved = save({"m": nn.Linear(2, 3), "t": torch.ones(2)})
    live = {"m": nn.Linear(2, 3, device="meta"), "t": torch.ones(3), "u": torch.empty(1, device="meta")}
    with pytest.raises(StateMismatch) as caught:
        saved.restore(live)
    meta = "is on the meta device and has no memory; materialise it first, for instance with to_empty(device=...)"
    assert caught.value.problems == (
        f"m.weight: {meta}",
        f"m.bias: {meta}",
        f"u: {meta}",
        "t: shape (2,) in the checkpoint, (3,) live",
        "u: in the live state, not in the checkpoint",
    )
    saved.restore({**live, "t": torch.zeros(2)}, names=["t"])


def test_memory_that_has_several_names_is_filled_once():
    source, target = make(1.0), make(2.0)
    source["again"], target["again"] = source["model"], target["model"]
    filling = save(source).restore(target)
    addresses = [target.tensor.data_ptr() for target in filling.targets]
    assert len(set(addresses)) == len(addresses)
    assert filling.unused == ()
    assert_same_state(source, target)


def test_strict_false_passes_over_parameters_that_the_optimizer_gained():
    net, other = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    saved = save({"model": net, "optim": torch.optim.SGD(net.parameters(), lr=0.5)})
    fresh = torch.optim.SGD(other.parameters(), lr=0.1)
    saved.restore({"model": other, "optim": fresh}, strict=False)
    assert fresh.param_groups[0]["lr"] == 0.5
    assert torch.equal(other[0].weight, net[0].weight)
