"""Schedulers, scalers, loaders, other stateful objects, and the random streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from ckptengine.errors import RestoreIncomplete, StateMismatch, UnreadableFormat, UnsupportedValue
from ckptengine.state import random as streams
from ckptengine.state.flatten import flatten
from ckptengine.state.sharded import PerRank

from .helpers import MemoryCheckpoint, assert_same_state, save

pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter", "ignore:Detected call of")


class Warm:
    """A callable object: torch saves its attributes."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, epoch: int) -> float:
        return self.scale / (epoch + 1)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR-object": lambda o: schedulers.LambdaLR(o, Warm(0.5)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=3),
    "CyclicLR-scale": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=3, scale_fn=Warm(2.0)),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.5),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5), schedulers.MultiStepLR(o, [1, 3])], [2, 5]
    ),
}


def advance(scheduler: object, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    rates = []
    for step in range(steps):
        optimizer.step()
        scheduler.step(1.0 + step % 2) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else scheduler.step()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_torch_scheduler_continues(name, tensor_lr):
    def make() -> dict[str, object]:
        net = nn.Linear(2, 2)
        rate = torch.tensor(0.1) if tensor_lr else 0.1
        groups = [{"params": [net.weight]}, {"params": [net.bias], "lr": rate * 2}]
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return {"model": net, "optim": optimizer, "sched": SCHEDULERS[name](optimizer)}

    source, target = make(), make()
    advance(source["sched"], source["optim"], 4)
    save(source).restore(target)
    assert_same_state(source, target)
    rates = advance(source["sched"], source["optim"], 6)
    assert advance(target["sched"], target["optim"], 6) == rates
    assert_same_state(source, target)


def test_a_scheduler_of_another_class_is_refused():
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters())
    saved = save({"m": net, "o": optimizer, "s": schedulers.StepLR(optimizer, 2)})
    live = {"m": net, "o": optimizer, "s": schedulers.ExponentialLR(optimizer, 0.9)}
    with pytest.raises(StateMismatch, match="s: StepLR in the checkpoint, ExponentialLR live"):
        saved.restore(live)


def test_grad_scaler():
    source, target = torch.amp.GradScaler("cpu", init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=2.0)
    save({"scaler": source}).restore({"scaler": target})
    assert target.state_dict() == source.state_dict()


class Loader:
    """Duck-typed like torchdata's StatefulDataLoader."""

    def __init__(self, order: list[str] | None = None) -> None:
        self.position, self.shuffle, self.order = 0, torch.Generator().manual_seed(1), order

    def __iter__(self) -> Iterator[int]:
        while True:
            self.position += 1
            yield int(torch.randint(1000, (), generator=self.shuffle))

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, "shuffle": self.shuffle.get_state(), "big": np.arange(3000) + self.position}

    def load_state_dict(self, state: dict[str, object]) -> None:
        if self.order is not None:
            self.order.append("loader")
        self.position = state["position"]
        assert state["big"][0] == self.position
        self.shuffle.set_state(state["shuffle"])


def test_a_loader_continues_where_it_was():
    source, target = Loader(), Loader()
    draws = iter(source)
    [next(draws) for _ in range(5)]
    save({"loader": PerRank(source), "other": Loader()}).restore({"loader": PerRank(target), "other": Loader()})
    draws, others = iter(source), iter(target)
    assert [next(draws) for _ in range(5)] == [next(others) for _ in range(5)]


class Owner:
    """Has a module that reads older state dicts by the versions which torch notes beside the entries."""

    def __init__(self) -> None:
        self.module = torch.nn.utils.spectral_norm(nn.Linear(3, 3))

    def state_dict(self) -> dict[str, object]:
        return {"module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.module.load_state_dict(state["module"])


def test_an_objects_state_dicts_of_modules_keep_their_versions():
    source, target = Owner(), Owner()
    save({"owner": source}).restore({"owner": target})
    assert_same_state({"owner": source}, {"owner": target})
    assert source.module(torch.ones(3)).isfinite().all()


class Recorder:
    def __init__(self, name: str, order: list[str], fail: bool = False) -> None:
        self.name, self.order, self.fail = name, order, fail

    def state_dict(self) -> dict[str, object]:
        if self.fail:
            raise RuntimeError("not now")
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.order.append(self.name)
        random.random()
        torch.rand(1)
        np.random.rand()


class Schedule(schedulers.LRScheduler):
    def __init__(self, optimizer: torch.optim.Optimizer, order: list[str]) -> None:
        self.order = order
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, object]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, object]) -> None:
        assert self.optimizer.param_groups[0]["lr"] == 0.5
        self.order.append("scheduler")


def test_objects_take_their_state_in_order_and_random_streams_last():
    def make(order: list[str], rate: float) -> dict[str, object]:
        net = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        return {
            "loader": Loader(order),
            "metric": Recorder("metric", order),
            "sched": Schedule(optimizer, order),
            "optim": optimizer,
            "model": net,
        }

    order: list[str] = []
    saved = save(make([], 0.5), random=True)
    expected = (random.random(), np.random.rand(), torch.rand(2).tolist())
    saved.restore(make(order, 0.1))
    assert order == ["scheduler", "metric", "loader"]
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_an_object_that_fails_is_named():
    with pytest.raises(UnsupportedValue, match=r"'x': its state_dict\(\) failed: RuntimeError\('not now'\)"):
        flatten({"x": Recorder("x", [], fail=True)}, random=False)


def test_an_object_that_refuses_its_state_leaves_a_clear_error():
    saved = save({"l": Loader()})
    assert saved.values["l"]["state"]["items"][0] == ["position", 0]
    saved.values["l"]["state"]["items"][0][1] = 5
    with pytest.raises(RestoreIncomplete, match="must not be used"):
        saved.restore({"l": Loader()})


def test_objects_inside_containers():
    source = {"list": [Loader(), {"a": (Loader(),)}]}
    target = {"list": [Loader(), {"a": (Loader(),)}]}
    next(iter(source["list"][1]["a"][0]))
    inner = target["list"][1]["a"][0]
    save(source).restore(target)
    assert inner.position == 1


def test_state_of_an_object_is_read_anew_and_never_aliased():
    loader = Loader()
    leaves = {leaf.name: leaf for leaf in flatten({"l": loader}, random=False).tensors}
    assert leaves["l.shuffle"].eager
    assert leaves["l.big"].eager


# random streams


def test_streams_are_saved_by_name():
    captured = streams.capture()
    assert list(captured)[:3] == ["python", "numpy", "torch.cpu"]


def test_streams_continue():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random.gauss(0, 1)
    np.random.randn()
    saved = save({"x": 1}, random=True)
    draw = lambda: (random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist(), torch.rand(1).item())  # noqa: E731
    expected = draw()
    saved.restore({"x": 0})
    assert draw() == expected


def test_streams_stay_when_not_asked_for():
    saved = save({"x": 1}, random=True)
    torch.manual_seed(99)
    expected = torch.random.get_rng_state()
    saved.restore({"x": 1}, random=False)
    saved.restore({"x": 1}, names=["x"])
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_a_stream_for_a_device_that_is_not_here():
    saved = save({"x": 1}, random=True)
    saved.rank_values[0]["random"]["torch.cuda.99"] = "AAAA"
    with pytest.raises(StateMismatch, match=r"random\.torch\.cuda\.99: saved for a device"):
        saved.restore({"x": 1})
    saved.restore({"x": 1}, random_policy="available")


@pytest.mark.parametrize(
    ("stream", "data"),
    [("python", {}), ("python", 5), ("torch.cpu", "AAAA"), ("torch.cpu", ""), ("numpy", {"state": 1}), ("numpy", [])],
)
def test_malformed_streams_change_nothing(stream, data):
    captured = {**streams.capture(), stream: data}
    before = streams.capture()
    with pytest.raises((UnreadableFormat, StateMismatch)):
        streams.restore(captured)
    assert streams.capture() == before


def test_derived_streams_are_reproducible_and_differ_by_rank():
    saved = [streams.capture(), streams.capture()]
    derived = [streams.derive(saved, rank, 3) for rank in range(3)]
    assert derived == [streams.derive(saved, rank, 3) for rank in range(3)]
    draws = set()
    for one in derived:
        streams.restore(one)
        draws.add((random.random(), np.random.rand(), torch.rand(1).item()))
    assert len({part for draw in draws for part in draw}) == 9
    assert streams.derive(saved, 0, 4) != derived[0]
    torch.rand(1)
    assert streams.derive([streams.capture()], 0, 3) != derived[0]


def test_missing_stream_is_a_problem():
    captured = streams.capture()
    del captured["numpy"]
    with pytest.raises(StateMismatch, match=r"random\.numpy: this stream was not saved"):
        streams.restore(captured)


def test_rank_values_of_another_rank_are_its_own():
    flats = [flatten({"c": PerRank({"cursor": n})}, random=False) for n in (10, 20)]
    saved = MemoryCheckpoint(*flats)
    target = {"c": PerRank({"cursor": 0})}
    saved.restore(target, rank=1)
    assert target["c"].value == {"cursor": 20}
    lost = MemoryCheckpoint(flats[0])
    lost.rank_values[0] = None
    with pytest.raises(StateMismatch, match="c: PerRank, and the checkpoint has no value of its own for this rank"):
        lost.restore(target)
    lost.restore(target, on_missing_rank="keep")
    assert target["c"].value == {"cursor": 20}
