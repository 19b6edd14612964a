"""Tensors of classes that wrap one other tensor, as torchao's weights that FSDP2 gathers in float8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import ckptengine as ce
from ckptengine.errors import TornCapture, UnsupportedValue
from ckptengine.store.files import FileOps

from .test_guard import WITHIN_S, Held


class Wrapper(torch.Tensor):
    """A tensor whose elements another one has; every operation is that one's."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, *more: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, requires_grad=held.requires_grad
        )

    def __init__(self, held: torch.Tensor, *more: torch.Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = tree_map(lambda x: x.held if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        made = func(*bare[0], **bare[1])
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return cls(made)
        return args[0] if func._schema.is_mutable and isinstance(args[0], Wrapper) else made


class Quantized(Wrapper):
    """One whose elements follow from two tensors."""

    def __init__(self, held: torch.Tensor, *more: torch.Tensor) -> None:
        self.held, self.scale = held, held.sum()

    def __tensor_flatten__(self) -> tuple[list[str], object]:
        return ["held", "scale"], None


def model(start: float, kind: type[Wrapper] = Wrapper) -> torch.nn.Module:
    made = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    for number, linear in enumerate(made.values()):
        values = torch.arange(9.0).reshape(3, 3) + 100 * number + start
        linear.weight = torch.nn.Parameter(kind(values))  # type: ignore[assignment]
    return made


def held(part: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.held.clone() for parameter in part.parameters()]  # type: ignore[attr-defined]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def stepped(part: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in part.parameters():
        parameter.grad = torch.ones(3, 3)
    optimizer.step()


@pytest.mark.parametrize("portable", [False, True], ids=["default engine", "portable"])
def test_a_wrapper_is_what_it_holds(tmp_path: Path, portable: bool) -> None:
    engine: dict[str, Any] = {"file_ops": FileOps()} if portable else {}
    net = model(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5)
    stepped(net, optimizer)
    wanted = {}
    state = {"net": net, "optim": optimizer, "bare": Wrapper(torch.ones(4))}
    with ce.Checkpointer(state, tmp_path, **engine) as checkpointer:
        for step in (1, 2, 3):
            wanted[step] = held(net)
            checkpointer.save(step)
            stepped(net, optimizer)  # behind the fence
        net["a"].weight.held = wanted[1][0].clone()  # the wrapper stays, its memory is another
        wanted[4] = held(net)
        checkpointer.save(4)
    for step, expected in wanted.items():
        again = model(1)
        other = torch.optim.SGD(again.parameters(), lr=1.0, momentum=0.5)
        bare = Wrapper(torch.zeros(4))
        assert ce.load({"net": again, "optim": other, "bare": bare}, tmp_path, step=step) == step
        assert same(held(again), expected), step
        assert torch.equal(bare.held, torch.ones(4))
    with ce.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("net.b.weight"), wanted[4][1])


def test_a_write_through_a_wrapper_is_found(tmp_path: Path) -> None:
    net, disk = model(0), Held()
    disk.threshold_bytes = 1
    disk.shut()
    told = pytest.raises(TornCapture, match=r"net\.b\.weight changed")
    with told, ce.Checkpointer({"net": net}, tmp_path, file_ops=disk) as checkpointer:
        handle = checkpointer.save(1)
        assert disk.reached.wait(WITHIN_S)
        with torch.no_grad():
            net["b"].weight.add_(1.0)
        disk.open()
        handle.wait("durable")
    assert ce.steps(tmp_path) == []


def test_one_that_holds_more_is_refused(tmp_path: Path) -> None:
    told = pytest.raises(UnsupportedValue, match=r"net\.a\.weight.*Quantized, a tensor subclass")
    with told, ce.Checkpointer({"net": model(0, Quantized)}, tmp_path) as checkpointer:
        checkpointer.save(1)
