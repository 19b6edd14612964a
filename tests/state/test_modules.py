"""Modules: canonical names, wrappers, hooks, extra state, ties."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

from ckptengine.errors import RestoreIncomplete, StateMismatch
from ckptengine.state.flatten import flatten
from ckptengine.state.sharded import Sharded

from .helpers import assert_same_state, save


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.head = nn.Linear(4, 5, bias=False)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_parameter("absent", None)


def names(state: object) -> list[str]:
    return [leaf.name for leaf in flatten(state, random=False).tensors]


def randomised(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 3
    return module


def test_names_are_those_of_state_dict():
    model = Net()
    assert names({"model": model}) == [f"model.{key}" for key in model.state_dict()]


def test_parameters_are_filled_in_place():
    source, target = randomised(Net()), Net()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in target.named_parameters()}
    save({"m": source}).restore({"m": target})
    assert_same_state(source, target)
    for name, tensor in target.named_parameters():
        assert before[name] == (tensor, tensor.data_ptr())
        assert tensor.requires_grad
    assert target.scratch.tolist() == [1, 1, 1]


def test_tied_parameters_and_shared_modules():
    def make() -> Net:
        net = randomised(Net())
        net.head.weight = net.embed.weight
        net.again = net.layers
        return net

    source, target = make(), make()
    flat = flatten({"m": source}, random=False)
    assert flat.aliases["m.head.weight"] == "m.embed.weight"
    assert flat.aliases["m.again.0.weight"] == "m.layers.0.weight"
    save({"m": source}).restore({"m": target})
    assert target.head.weight is target.embed.weight
    assert_same_state(source, target)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_are_not_part_of_a_name():
    plain = randomised(Net())
    wrapped = Net()
    wrapped.layers[0] = checkpoint_wrapper(wrapped.layers[0])
    wrapped = nn.DataParallel(torch.compile(wrapped, backend="eager"))
    assert sorted(names(wrapped)) == sorted(names(plain))
    saved = save({"m": plain})
    saved.restore({"m": wrapped})
    assert torch.equal(wrapped.module._orig_mod.layers[0]._checkpoint_wrapped_module.weight, plain.layers[0].weight)
    back = Net()
    save({"m": wrapped}).restore({"m": back})
    assert_same_state(plain, back)


def test_only_true_wrappers_are_stripped():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)
            self._orig_mod = nn.Linear(1, 1)

    assert names(Holder()) == ["module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias"]
    assert names({"module": {"x": torch.ones(1)}}) == ["module.x"]


class Extra(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.value = value

    def get_extra_state(self) -> object:
        return self.value

    def set_extra_state(self, state: object) -> None:
        self.value = state


@pytest.mark.parametrize(
    "value",
    [{"a": (1, 2)}, None, [torch.arange(3.0)], torch.arange(4, dtype=torch.uint8), torch.empty(0)],
    ids=["dict", "none", "nested-tensor", "tensor", "empty-tensor"],
)
def test_extra_state(value):
    source, target = nn.Sequential(Extra(value)), nn.Sequential(Extra({"other": torch.zeros(7)}))
    save({"m": source}).restore({"m": target})
    assert_same_state(source, target)


def test_extra_state_bytes():
    source, target = Extra(io.BytesIO(b"state")), Extra(io.BytesIO(b""))
    save({"m": source}).restore({"m": target})
    assert target.value.getvalue() == b"state"


class Doubling(nn.Module):
    """Stores its weight doubled, under another key; takes it back in a load hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.other = nn.Parameter(torch.rand(2))
        self.register_state_dict_post_hook(self._double)
        self.register_load_state_dict_pre_hook(self._halve)
        self.loaded = 0

    @staticmethod
    def _double(module, state, prefix, metadata):
        state[prefix + "twice"] = state.pop(prefix + "weight") * 2
        state[prefix + "note"] = "doubled"

    def _halve(self, module, state, prefix, *rest):
        assert state.pop(prefix + "note") == "doubled"
        state[prefix + "weight"] = state.pop(prefix + "twice") / 2
        self.loaded += 1


def test_state_dict_hooks_are_honoured():
    source, target = nn.Sequential(Doubling()), nn.Sequential(Doubling())
    flat = flatten({"m": source}, random=False)
    assert [leaf.name for leaf in flat.tensors] == ["m.0.other", "m.0.twice"]
    assert flat.values == {"m": {"$": "module", "extra": {"0.note": "doubled"}}}
    weight = target[0].weight
    save({"m": source}).restore({"m": target})
    assert target[0].loaded == 1
    assert target[0].weight is weight
    assert torch.equal(weight, source[0].weight)
    assert torch.equal(target[0].other, source[0].other)


def test_load_hooks_alone_are_called():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    calls = []
    target.register_load_state_dict_post_hook(lambda m, keys: calls.append(torch.equal(m.weight, source.weight)))
    save({"m": source}).restore({"m": target})
    assert calls == [True]


def test_a_module_that_refuses_its_state_says_restore_incomplete():
    source, target = Extra(1), Extra(2)
    target.set_extra_state = lambda state: 1 / 0
    with pytest.raises(RestoreIncomplete, match="ZeroDivisionError"):
        save({"m": source}).restore({"m": target})


def test_parametrizations():
    def make() -> nn.Module:
        normed, orthogonal = nn.Linear(3, 3), nn.Linear(3, 3)
        return nn.Sequential(parametrizations.weight_norm(normed), parametrizations.orthogonal(orthogonal))

    source, target = make(), make()
    with torch.no_grad():
        for tensor in source.parameters():
            tensor += 1
    save({"m": source}).restore({"m": target})
    assert_same_state(source, target)
    assert parametrize.is_parametrized(target[0])


def test_a_state_dict_may_hold_sharded_tensors():
    def make() -> nn.Linear:
        layer = nn.Linear(4, 2, bias=False)

        def shard(module, state, prefix, metadata):
            state[prefix + "weight"] = Sharded(state[prefix + "weight"], (8, 4), offset=(2, 0))

        layer.register_state_dict_post_hook(shard)
        return layer

    source, target = make(), make()
    (leaf,) = flatten({"m": source}, random=False).tensors
    assert (leaf.global_shape, leaf.pieces[0].box.offsets, leaf.role) == ((8, 4), (2, 0), "parameter")
    weight = target.weight
    save({"m": source}).restore({"m": target})
    assert target.weight is weight
    assert torch.equal(weight, source.weight)


def test_ema_keeps_its_own_names():
    source = torch.optim.swa_utils.AveragedModel(randomised(Net()))
    target = torch.optim.swa_utils.AveragedModel(Net())
    source.update_parameters(randomised(Net()))
    assert "ema.module.embed.weight" in names({"ema": source})
    save({"ema": source}).restore({"ema": target})
    assert_same_state(source, target)
    assert int(target.n_averaged) == 1


def test_a_frozen_and_a_replaced_module_are_named_in_the_report():
    with pytest.raises(StateMismatch) as caught:
        save({"m": nn.Linear(2, 3)}).restore({"m": nn.Linear(3, 3, dtype=torch.bfloat16)})
    assert caught.value.problems == (
        "m.weight: shape (3, 2) in the checkpoint, (3, 3) live",
        "m.bias: dtype float32 in the checkpoint, bfloat16 live",
    )


def test_unused_lazy_module_after_first_forward():
    source, target = nn.LazyLinear(2), nn.LazyLinear(2)
    source(torch.ones(1, 3))
    target(torch.ones(1, 3))
    save({"m": source}).restore({"m": target})
    assert_same_state(source, target)


class Adapter(nn.Module):
    """Saves its own small part only, above a base whose modules have load hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
        self.small = nn.Linear(3, 3)

    def state_dict(self, *args: object, **options: object) -> dict[str, object]:
        return {key: part for key, part in super().state_dict(*args, **options).items() if "small" in key}


def test_what_a_module_leaves_out_of_its_state_may_be_missing() -> None:
    source, target = Adapter(), Adapter()
    base = target.base.weight_orig.clone()
    assert names({"m": source}) == ["m.small.weight", "m.small.bias"]
    save({"m": source}).restore({"m": target})
    assert torch.equal(target.small.weight, source.small.weight)
    assert torch.equal(target.base.weight_orig, base)


class Dropping(nn.Module):
    """Makes an entry of its own, and drops or renames it when it is to take it."""

    def __init__(self, becomes: str | None) -> None:
        super().__init__()
        self.weight, self.becomes = nn.Parameter(torch.zeros(2)), becomes
        self.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(weight=state["weight"] + 1))
        self.register_load_state_dict_pre_hook(self.drop)

    def drop(self, module: nn.Module, state: dict[str, object], prefix: str, *_: object) -> None:
        taken = state.pop(prefix + "weight")
        if self.becomes is not None:
            state[prefix + self.becomes] = taken


@pytest.mark.parametrize("becomes", [None, "other"])
def test_what_a_module_gave_and_does_not_take_is_told(becomes: str | None) -> None:
    saved = save({"m": Dropping(becomes)})
    with pytest.raises(RestoreIncomplete, match=f"Dropping did not take .*{becomes or 'weight'}"):
        saved.restore({"m": Dropping(becomes)})
