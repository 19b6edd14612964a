"""Optimizers: by parameter name, made fresh on restore, groups matched by their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from ckptengine.errors import StateMismatch, UnsupportedValue
from ckptengine.state.flatten import flatten

from .helpers import assert_same_state, save


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for step in range(steps):
        data = torch.sin(torch.arange(15.0).reshape(5, 3) + step)

        def closure(data: torch.Tensor = data) -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(data).square().sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


OPTIMIZERS = {
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "AdamW-amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "Muon": lambda p: torch.optim.Muon([one for one in p if one.ndim == 2], lr=0.01),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": torch.optim.SGD,
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_torch_optimizer_resumes_bit_for_bit(name):
    torch.manual_seed(0)
    net = model()
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    train(net, optimizer)
    saved = save({"model": net, "optim": optimizer})
    torch.manual_seed(1)
    other = model()
    fresh = OPTIMIZERS[name](list(other.parameters()))
    saved.restore({"model": other, "optim": fresh})
    assert_same_state({"model": net, "optim": optimizer}, {"model": other, "optim": fresh})
    for parameter, mirror in zip(net.parameters(), other.parameters(), strict=True):
        for key, part in optimizer.state[parameter].items():
            made = fresh.state[mirror][key]
            assert type(made) is type(part)
            if isinstance(part, torch.Tensor):
                assert (made.dtype, made.shape, made.device) == (part.dtype, part.shape, part.device)
    assert train(other, fresh) == train(net, optimizer)
    assert_same_state({"model": net, "optim": optimizer}, {"model": other, "optim": fresh})


def test_state_is_named_by_parameter():
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, 1)
    flat = flatten({"model": net, "optim": optimizer}, random=False)
    found = [leaf.name for leaf in flat.tensors if leaf.role == "optimizer"]
    assert found == [
        f"optim.{parameter}.{state}"
        for parameter in ("0.weight", "0.bias", "2.weight")
        for state in ("step", "exp_avg", "exp_avg_sq")
    ]
    assert flat.values["optim"]["groups"][0]["params"] == ["0.weight", "0.bias", "2.weight"]
    assert flat.values["optim"]["groups"][0]["values"]["items"][0] == ["lr", 0.001]


def test_order_of_the_state_and_of_the_parameters_does_not_matter():
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.3)
    train(net, optimizer)
    other = model()
    fresh = torch.optim.Adam(list(reversed(list(other.parameters()))), lr=0.1)
    save({"optim": optimizer, "model": net}).restore({"model": other, "optim": fresh})
    for parameter, mirror in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], fresh.state[mirror]["exp_avg"])
    assert fresh.param_groups[0]["lr"] == 0.3


def groups_of(net: nn.Module) -> list[dict[str, object]]:
    return [
        {"params": [net[0].weight, net[2].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [net[0].bias], "lr": 0.2, "weight_decay": 0.0},
    ]


def test_groups_keep_their_hyper_parameters_and_identity():
    net, other = model(), model()
    optimizer = torch.optim.AdamW(groups_of(net))
    fresh = torch.optim.AdamW(list(reversed(groups_of(other))), lr=9.0)
    for group in fresh.param_groups:
        group["lr"] = 9.0
        group["weight_decay"] = 9.0
    live = list(fresh.param_groups)
    train(net, optimizer)
    save({"model": net, "optim": optimizer}).restore({"model": other, "optim": fresh})
    assert fresh.param_groups[0] is live[0]
    assert (live[0]["lr"], live[0]["weight_decay"]) == (0.2, 0.0)
    assert (live[1]["lr"], live[1]["weight_decay"]) == (0.1, 0.5)
    assert live[0]["params"][0] is other[0].bias


def test_a_merged_group_is_refused_where_hyper_parameters_differ():
    net, other = model(), model()
    optimizer = torch.optim.AdamW(groups_of(net))
    saved = save({"model": net, "optim": optimizer})
    with pytest.raises(StateMismatch, match="hyper-parameters differ"):
        saved.restore({"model": other, "optim": torch.optim.AdamW(other.parameters())})


def test_a_split_group_takes_the_hyper_parameters_of_the_whole():
    net, other = model(), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    fresh = torch.optim.SGD(groups_of(other))
    save({"model": net, "optim": optimizer}).restore({"model": other, "optim": fresh})
    assert [group["lr"] for group in fresh.param_groups] == [0.25, 0.25]


def test_existing_state_is_filled_in_place_and_stale_state_dropped():
    net, other = model(), model()
    optimizer, live = torch.optim.Adam(net.parameters()), torch.optim.Adam(other.parameters())
    before_first_step = save({"model": net, "optim": optimizer})
    train(net, optimizer, 2)
    train(other, live, 5)
    memory = live.state[other[0].weight]["exp_avg"]
    step = live.state[other[0].weight]["step"]
    save({"model": net, "optim": optimizer}).restore({"model": other, "optim": live})
    assert live.state[other[0].weight]["exp_avg"] is memory
    assert live.state[other[0].weight]["step"] is step
    assert float(step) == 2
    before_first_step.restore({"model": other, "optim": live})
    assert not any(live.state.values())
    assert train(other, live, 1)


def test_how_a_step_is_computed_stays_as_live():
    net, other = model(), model()
    optimizer = torch.optim.AdamW(net.parameters(), foreach=True, lr=0.5)
    fresh = torch.optim.AdamW(other.parameters(), fused=True)
    train(net, optimizer)
    save({"model": net, "optim": optimizer}).restore({"model": other, "optim": fresh})
    group = fresh.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (True, None, 0.5)
    train(other, fresh)


def test_tensor_learning_rate_is_filled_in_place():
    net, other = model(), model()
    optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.5))
    fresh = torch.optim.Adam(other.parameters(), lr=torch.tensor(0.1))
    rate = fresh.param_groups[0]["lr"]
    save({"model": net, "optim": optimizer}).restore({"model": other, "optim": fresh})
    assert fresh.param_groups[0]["lr"] is rate
    assert rate == 0.5
    plain = torch.optim.Adam(net.parameters(), lr=0.75)
    save({"model": net, "optim": plain}).restore({"model": other, "optim": fresh})
    assert fresh.param_groups[0]["lr"] is rate
    assert rate == 0.75


def test_several_optimizers_and_several_modules():
    def make() -> dict[str, object]:
        generator, critic = model(), model()
        return {
            "g": generator,
            "d": {"critic": critic},
            "optims": [torch.optim.Adam(generator.parameters()), torch.optim.SGD(critic.parameters(), momentum=0.9)],
            "both": torch.optim.RMSprop([*generator.parameters(), *critic.parameters()]),
        }

    source, target = make(), make()
    for net, optimizer in ((source["g"], source["optims"][0]), (source["d"]["critic"], source["optims"][1])):
        train(net, optimizer)
    for parameter in source["both"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    source["both"].step()
    saved = save(source)
    assert "optims.0.0.weight.exp_avg" in saved.data
    assert "optims.1.0.weight.momentum_buffer" in saved.data
    assert "both.g.0.weight.square_avg" in saved.data
    assert "both.d.critic.0.weight.square_avg" in saved.data
    saved.restore(target)
    assert_same_state(source, target)
    leaves = {leaf.name: leaf for leaf in flatten(source, random=False).tensors}
    assert set(leaves["g.0.weight"].owners) == {id(source["optims"][0]), id(source["both"])}


def test_bare_parameters_are_named_by_their_place():
    def make(value: float) -> dict[str, object]:
        weights = {"w": nn.Parameter(torch.full((2,), value)), "deep": {"b": nn.Parameter(torch.full((3,), value))}}
        optimizer = torch.optim.SGD([weights["w"], weights["deep"]["b"]], lr=value, momentum=0.9)
        return {"weights": weights, "optim": optimizer}

    source, target = make(1.0), make(2.0)
    for parameter in source["optim"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    source["optim"].step()
    saved = save(source)
    assert set(saved.data) == {
        "weights.w",
        "weights.deep.b",
        "optim.w.momentum_buffer",
        "optim.deep.b.momentum_buffer",
    }
    saved.restore(target)
    assert_same_state(source, target)


def test_a_parameter_without_a_name_is_refused_and_param_names_help():
    net = model()
    with pytest.raises(UnsupportedValue, match=r"'optim': parameter 0 of group 0 \(shape \(4, 3\)\) is in no module"):
        flatten({"optim": torch.optim.SGD(net.parameters())}, random=False)
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.5, momentum=0.9)
    train(net, optimizer)
    assert "optim.0.weight.momentum_buffer" in save({"optim": optimizer}).data


def test_added_and_removed_parameters_are_reported():
    net, other = model(), model()
    optimizer = torch.optim.Adam(net[0].parameters())
    train(net, optimizer, 1)
    saved = save({"model": net, "optim": optimizer})
    fresh = torch.optim.Adam([other[0].weight, other[2].weight])
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(StateMismatch) as caught:
        saved.restore({"model": other, "optim": fresh})
    assert caught.value.problems == (
        "optim.2.weight: this parameter was not in the saved optimizer",
        "optim.0.bias.step: in the checkpoint, not in the live state",
        "optim.0.bias.exp_avg: in the checkpoint, not in the live state",
        "optim.0.bias.exp_avg_sq: in the checkpoint, not in the live state",
    )
    assert fresh.state_dict() == before
    assert not fresh.state


class Nested(torch.optim.Optimizer):
    """State in the shape of block optimizers: nested containers, odd keys, state for no parameter."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("blocks", {"left": torch.eye(2), 0: [torch.zeros(3), {"deep": torch.ones(1)}]})
                state.setdefault("a.b", torch.zeros_like(parameter))
                state.setdefault(7, torch.zeros(2))
                state.setdefault("count", 0)
                state.setdefault("flag", None)
                state["blocks"]["left"] += 1
                state["a.b"] += 2
                state["count"] += 1
        self.state.setdefault("global", {"sum": torch.zeros(1), "n": 3})


def test_nested_state_with_odd_keys():
    net, other = model(), model()
    optimizer, fresh = Nested(net.parameters()), Nested(other.parameters())
    optimizer.step()
    optimizer.step()
    state, target = {"model": net, "optim": optimizer}, {"model": other, "optim": fresh}
    save(state).restore(target)
    assert_same_state(state, target)
    fresh.step()
    optimizer.step()
    assert_same_state(state, target)
    assert fresh.state[other[0].weight]["blocks"][0][1]["deep"].item() == 1
    assert fresh.state["global"]["n"] == 3


def test_two_tensors_that_would_share_a_name_are_refused():
    net = nn.Module()
    net.param_groups = nn.ParameterList([nn.Parameter(torch.ones(2))])
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1))
    optimizer.state[net.param_groups[0]]["lr"] = torch.ones(2)
    with pytest.raises(UnsupportedValue, match=r"'optim\.param_groups\.0\.lr': two tensors"):
        flatten({"model": net, "optim": optimizer}, random=False)


class Hiding(torch.optim.SGD):
    """Keeps its state elsewhere, as wrappers that shard an optimizer do."""

    def state_dict(self):
        packed = super().state_dict()
        packed["state"] = {0: {"momentum_buffer": torch.ones(2)}}
        return packed


class Adding(torch.optim.SGD):
    def state_dict(self):
        return super().state_dict() | {"scale": 3}


@pytest.mark.parametrize(("kind", "told"), [(Hiding, "state that optimizer.state does not"), (Adding, r"\['scale'\]")])
def test_state_beside_the_optimizers_own_is_never_lost_in_silence(kind, told):
    net = model()
    with pytest.raises(UnsupportedValue, match=f"'optim': state_dict.*{told}"):
        flatten({"model": net, "optim": kind(net.parameters())}, random=False)


class Refusing(torch.optim.Optimizer):
    """Keeps its state in another optimizer and has no `state_dict` at this moment, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.optim = torch.optim.AdamW(parameters)

    def state_dict(self) -> dict[str, object]:
        raise RuntimeError("consolidate first")


class Sharpness(torch.optim.Optimizer):
    """Steps by another optimizer, of whose state its own ``state_dict`` knows nothing, as SAM does."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self.base.step(closure)


def test_a_wrapped_optimizer_that_nothing_saves_is_asked_for() -> None:
    (net, other), states = (model(), model()), []
    for one in (net, other):
        optimizer = Sharpness(one.parameters())
        with pytest.raises(UnsupportedValue, match=r"'optim': Sharpness keeps state in \.base, .*into the state too"):
            flatten({"model": one, "optim": optimizer}, random=False)
        states.append({"model": one, "optim": optimizer, "base": optimizer.base})
    train(net, states[0]["optim"])
    save(states[0]).restore(states[1])
    assert_same_state(*states)
    assert states[1]["base"].state[other[0].weight]["momentum_buffer"].any()


class Wrapping(torch.optim.AdamW):
    """Puts some of its state into a dict of its own when asked for it, as those of bitsandbytes do."""

    def state_dict(self) -> dict[str, object]:
        packed = super().state_dict()
        packed["state"] = {
            index: {"step": state["step"], "wrapped": {k: part for k, part in state.items() if k != "step"}}
            for index, state in packed["state"].items()
        }
        return packed


def test_state_that_is_only_packed_otherwise_is_the_optimizers_own() -> None:
    states = [{"model": net, "optim": Wrapping(net.parameters())} for net in (model(), model())]
    train(states[0]["model"], states[0]["optim"])
    save(states[0]).restore(states[1])
    assert_same_state(*states)
    assert len(states[1]["optim"].state) == 3


def test_a_wrapper_whose_state_is_in_what_it_wraps_is_refused() -> None:
    net = model()
    wrapper = Refusing(list(net.parameters()))
    train(net, wrapper.optim)
    with pytest.raises(UnsupportedValue, match=r"'optim'.*Refusing keeps its state in \.optim.*consolidate first"):
        flatten({"model": net, "optim": wrapper}, random=False)
    names = [leaf.name for leaf in flatten({"model": net, "optim": wrapper.optim}, random=False).tensors]
    assert "optim.0.weight.exp_avg" in names
