"""What one optimizer saved and another one is to take: another algorithm is refused, the same under any name is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

import ckptengine as ce
from ckptengine.errors import StateMismatch

Make = Callable[[Any], Optimizer]


class MyAdamW(AdamW):
    """A derived one."""


class FusedAdam(Optimizer):
    """As fused kernels come: another name, not derived, a hyper-parameter of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.5, 0.6), "eps": 1e-3, "bias_correction": 1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"] = torch.ones_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.ones_like(parameter)


class Momentum(Optimizer):
    """SGD under another name: just the same hyper-parameters."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.3).defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)


class Wrapper(Optimizer):
    """As Accelerate wraps: the inner one's groups and state, a class of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.defaults = optimizer.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


def built(make: Make, *, trained: bool) -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    if trained:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        (optimizer.optimizer if isinstance(optimizer, Wrapper) else optimizer).step()
    return {"model": model, "optim": optimizer}


def wrapped(params: Any) -> Optimizer:
    return Wrapper(AdamW(params))


OTHERS = [
    (AdamW, SGD), (lambda p: SGD(p, momentum=0.9), AdamW), (Adam, NAdam), (Adamax, Adam), (Adagrad, Adam),
    (lambda p: SGD(p, momentum=0.9), lambda p: RMSprop(p, momentum=0.9)), (FusedAdam, SGD), (SGD, FusedAdam),
    (Momentum, AdamW),
]  # fmt: skip
SAME = [
    (AdamW, AdamW), (AdamW, MyAdamW), (MyAdamW, AdamW), (Adam, AdamW), (AdamW, Adam), (AdamW, wrapped),
    (wrapped, AdamW), (wrapped, wrapped), (lambda p: SGD(p, momentum=0.3), Momentum), (Momentum, SGD),
    (lambda p: AdamW(p, foreach=True), lambda p: AdamW(p, fused=True)),
]  # fmt: skip
ALIKE = [(FusedAdam, AdamW), (AdamW, FusedAdam)]


@pytest.mark.parametrize(("was", "now"), OTHERS)
def test_another_algorithm_is_refused(tmp_path: Path, was: Make, now: Make) -> None:
    ce.save(built(was, trained=True), tmp_path, 1)
    live = built(now, trained=False)
    before = [parameter.detach().clone() for parameter in live["model"].parameters()]
    keys = set(live["optim"].param_groups[0])
    with pytest.raises(StateMismatch, match=r"optim: saved by \S+, and \S+ live, which is another") as refused:
        ce.load(live, tmp_path)
    assert "strict=False" in str(refused.value)
    assert all(map(torch.equal, before, live["model"].parameters())), "nothing was changed"
    assert set(live["optim"].param_groups[0]) == keys
    assert not live["optim"].state
    assert ce.load(live, tmp_path, names=["model"]) == 1
    assert ce.load(live, tmp_path, strict=False) == 1, "as torch does"
    assert live["optim"].param_groups[0]["lr"] == built(was, trained=False)["optim"].param_groups[0]["lr"]


@pytest.mark.parametrize(("was", "now"), SAME)
def test_the_same_algorithm_passes(tmp_path: Path, was: Make, now: Make, caplog: pytest.LogCaptureFixture) -> None:
    saved, live = built(was, trained=True), built(now, trained=False)
    ce.save(saved, tmp_path, 1)
    with caplog.at_level(logging.WARNING, "ckptengine"):
        assert ce.load(live, tmp_path) == 1
    assert caplog.text == ""
    for a, b in zip(saved["model"].parameters(), live["model"].parameters(), strict=True):
        theirs, ours = saved["optim"].state[a], live["optim"].state[b]
        assert set(theirs) == set(ours)
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs if isinstance(theirs[key], torch.Tensor))


@pytest.mark.parametrize(("was", "now"), ALIKE)
def test_what_is_alike_passes_with_a_word(
    tmp_path: Path, was: Make, now: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ce.save(built(was, trained=True), tmp_path, 1)
    live = built(now, trained=False)
    with caplog.at_level(logging.WARNING, "ckptengine"):
        assert ce.load(live, tmp_path) == 1
    assert "taken for the same algorithm" in caplog.text
    assert "exp_avg" in live["optim"].state[live["model"].weight]


def test_the_class_says_how_weight_decay_works(tmp_path: Path) -> None:
    ce.save(built(lambda p: Adam(p, lr=0.5), trained=True), tmp_path, 1)
    live = built(AdamW, trained=False)
    assert ce.load(live, tmp_path) == 1
    assert live["optim"].param_groups[0]["decoupled_weight_decay"] is True, "it is still an AdamW"
    assert live["optim"].param_groups[0]["lr"] == 0.5
    ce.save(built(lambda p: Adam(p, decoupled_weight_decay=True), trained=True), tmp_path, 2)
    same = built(Adam, trained=False)
    assert ce.load(same, tmp_path) == 2
    assert same["optim"].param_groups[0]["decoupled_weight_decay"] is True, "of the same class it is a setting"


def test_a_checkpointer_refuses_on_restore(tmp_path: Path) -> None:
    with ce.Checkpointer(built(AdamW, trained=True), tmp_path) as checkpointer:
        checkpointer.save(1).result()
    with ce.Checkpointer(built(SGD, trained=False), tmp_path) as checkpointer:
        with pytest.raises(StateMismatch, match="another algorithm"):
            checkpointer.restore()
        assert checkpointer.restore(strict=False) == 1


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_an_expanded_tensor_takes_only_what_it_can_hold(tmp_path: Path, equal: bool, dtype: torch.dtype) -> None:
    rows = torch.tensor([[1, 0, 1], [1, 0, 1 if equal else 0]]).to(dtype)
    ce.save({"a": torch.arange(3.0), "rows": rows}, tmp_path, 1)
    live = {"a": torch.zeros(3), "rows": torch.zeros(1, 3, dtype=dtype).expand(2, 3)}
    if equal:
        assert ce.load(live, tmp_path) == 1
        assert torch.equal(live["rows"], rows)
        assert live["rows"].stride() == (0, 1)
        return
    with pytest.raises(StateMismatch, match=r"rows: its elements share memory here .*\.clone\(\)"):
        ce.load(live, tmp_path)
    assert not live["a"].any(), "nothing was changed"
    assert not live["rows"].any()
    live["rows"] = live["rows"].clone()
    assert ce.load(live, tmp_path) == 1
    assert torch.equal(live["rows"], rows)
