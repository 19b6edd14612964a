"""The fence and the mutation guard: what changes while being captured is never committed; what is fenced is exact.

A slow disk (each write waits for a latch) keeps the capture open for as long as a test wants.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptengine as ce
from ckptengine.errors import SaveFailed, Stalled, TornCapture
from ckptengine.snapshot import fence
from ckptengine.snapshot.plain import PlainEngine
from ckptengine.store.files import FileOps

from ..descriptors import open_descriptors

WITHIN_S = 60.0


class Latch(FileOps):
    """Writes of rank files wait until `open` is called; ``reached`` is set when the first one waits."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def preallocate(self, fd: int, nbytes: int) -> None:
        self.reached.set()
        self._open.wait(WITHIN_S)
        super().preallocate(fd, nbytes)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.reached.set()
        self._open.wait(WITHIN_S)
        return super().pwrite(fd, data, offset)


class Held(Latch):
    """Only large writes wait: the capture has begun, what is first in it is captured, the rest is not."""

    threshold_bytes = 8192

    def preallocate(self, fd: int, nbytes: int) -> None:
        FileOps.preallocate(self, fd, nbytes)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if len(data) >= self.threshold_bytes:
            self.reached.set()
            self._open.wait(WITHIN_S)
        return FileOps.pwrite(self, fd, data, offset)


@pytest.fixture
def latch() -> Iterator[Held]:
    held = Held()
    yield held
    held.open()


def tensors(count: int = 4) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.arange(5000.0) + 10_000 * i for i in range(count)}


def model_and(optimizer: Callable[..., torch.optim.Optimizer], **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 3))
    return model, optimizer(model.parameters(), lr=0.05, **settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    data = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
    model(data).square().mean().backward()
    optimizer.step()


def frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A private copy of what a save must hold."""
    copied = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                copied[f"optim.{names[id(parameter)]}.{key}"] = value.clone()
    return copied


def assert_holds(root: Path, step: int, wanted: dict[str, Any]) -> None:
    with ce.open(root, step) as checkpoint:
        for name, value in wanted.items():
            assert torch.equal(checkpoint.read(name), value), name


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW plain": (torch.optim.AdamW, {"foreach": False}),
    "SGD fused": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adagrad fused": (torch.optim.Adagrad, {"fused": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
}


@pytest.mark.parametrize("which", list(OPTIMIZERS))
@pytest.mark.parametrize("portable", [False, True], ids=["default engine", "portable"])
def test_a_step_right_after_save_waits_for_the_capture(tmp_path: Path, which: str, portable: bool) -> None:
    """Save and step again and again with no pause: every checkpoint is exactly the state when save was called."""
    kind, settings = OPTIMIZERS[which]
    model, optimizer = model_and(kind, **settings)
    wanted = {}
    engine = {"file_ops": FileOps()} if portable else {}
    with ce.Checkpointer({"model": model, "optim": optimizer}, tmp_path, **engine) as checkpointer:
        for step in range(1, 9):
            train(model, optimizer, step)
            wanted[step] = frozen(model, optimizer)
            checkpointer.save(step)
    for step, values in wanted.items():
        assert_holds(tmp_path, step, values)


def test_the_step_blocks_until_the_latch_opens(tmp_path: Path, latch: Held) -> None:
    """While the capture cannot go on, the optimizer does not run; then it does, and the save is good."""
    model, optimizer = model_and(torch.optim.AdamW, fused=True)
    train(model, optimizer)
    with ce.Checkpointer({"model": model, "optim": optimizer}, tmp_path, file_ops=latch) as checkpointer:
        wanted = frozen(model, optimizer)
        latch.threshold_bytes = 1
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        stepping = threading.Thread(target=train, args=(model, optimizer))
        stepping.start()
        stepping.join(0.3)
        assert stepping.is_alive()
        assert torch.equal(model[0].weight, wanted["model.0.weight"])  # type: ignore[index]
        latch.open()
        stepping.join(WITHIN_S)
        assert not stepping.is_alive()
        assert handle.result(WITHIN_S) == 1
        assert handle.progress["fence_ms"] > 100
    assert not torch.equal(model[0].weight, wanted["model.0.weight"])  # type: ignore[index]
    assert_holds(tmp_path, 1, wanted)


def test_a_parameter_that_has_come_to_another_optimizer_is_fenced_by_that_one(tmp_path: Path, latch: Held) -> None:
    first, second, stays = (nn.Parameter(torch.zeros(5000)) for _ in range(3))
    one = torch.optim.SGD([first, stays], lr=1.0, fused=True)
    other = torch.optim.SGD([second], lr=1.0, fused=True)
    state = {"first": first, "second": second, "stays": stays, "one": one, "other": other}
    with ce.Checkpointer(state, tmp_path, file_ops=latch) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        other.add_param_group({"params": [one.param_groups[0]["params"].pop(0)]})
        first.grad = torch.ones_like(first)
        stepping = threading.Thread(target=other.step)
        stepping.start()
        stepping.join(0.2)
        assert not first.any()
        latch.open()
        stepping.join(WITHIN_S)
        assert first.all()
        assert handle.result(WITHIN_S) == 1
    assert_holds(tmp_path, 1, {"first": torch.zeros(5000)})


def test_moments_that_two_optimizers_share_are_fenced_by_both(tmp_path: Path, latch: Held) -> None:
    """``load_state_dict`` makes no copies: whoever takes over another optimizer's state writes to the same memory."""
    parameters = [nn.Parameter(torch.full((5000,), float(i))) for i in range(2)]
    optimizers = [torch.optim.SGD([one], lr=0.1, momentum=0.9, foreach=True) for one in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones(5000)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    shared = optimizers[0].state[parameters[0]]["momentum_buffer"]
    assert optimizers[1].state[parameters[1]]["momentum_buffer"] is shared
    state = {"p": parameters, "optim": optimizers}
    with ce.Checkpointer(state, tmp_path, file_ops=latch, random=False, on_failure=ce.Tolerate()) as checkpointer:
        checkpointer.save(1).wait("durable", WITHIN_S)
        wanted = shared.clone()
        latch.shut()
        handle = checkpointer.save(2)
        latch.reached.wait(WITHIN_S)
        stepping = threading.Thread(target=optimizers[1].step)
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive()  # it waits
        latch.open()
        stepping.join(WITHIN_S)
        handle.wait("durable", WITHIN_S)
    assert_holds(tmp_path, 2, {"optim.0.0.momentum_buffer": wanted})


def test_closures_gradient_accumulation_and_several_optimizers(tmp_path: Path) -> None:
    model, _ = model_and(torch.optim.SGD)
    first = torch.optim.LBFGS(model[0].parameters(), max_iter=3)  # type: ignore[index]
    second = torch.optim.AdamW(model[3].parameters())  # type: ignore[index]
    data = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        return loss

    wanted = {}
    with ce.Checkpointer({"model": model, "first": first, "second": second}, tmp_path, random=False) as checkpointer:
        for step in range(1, 6):
            wanted[step] = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
            checkpointer.save(step)
            first.step(closure)
            closure()
            second.step()
    for step, values in wanted.items():
        assert_holds(tmp_path, step, values)


def test_a_step_that_a_grad_scaler_skips_neither_waits_nor_tears(tmp_path: Path, latch: Held) -> None:
    model, optimizer = model_and(torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wanted = frozen(model, optimizer)
    latch.threshold_bytes = 1
    state = {"model": model, "optim": optimizer, "scaler": scaler}
    with ce.Checkpointer(state, tmp_path, file_ops=latch) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("inf"))
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)  # a fence would wait for ever
        scaler.update()
        latch.open()
        assert handle.result(WITHIN_S) == 1
    assert_holds(tmp_path, 1, wanted)
    with ce.open(tmp_path) as checkpoint:
        assert checkpoint.values()["scaler"]["scale"] == 4.0


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps(tmp_path: Path) -> None:
    """A step under torch.compile (eager backend: what matters is that the hooks fire, and are not compiled)."""
    model, optimizer = model_and(torch.optim.AdamW, foreach=True)
    train(model, optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    wanted = {}
    with ce.Checkpointer({"model": model, "optim": optimizer}, tmp_path, random=False) as checkpointer:
        for step in range(1, 7):
            model(torch.randn(8, 24, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            wanted[step] = frozen(model, optimizer)
            checkpointer.save(step)
            compiled()
    for step, values in wanted.items():
        assert_holds(tmp_path, step, values)


class Traced:
    """Tells whether the compiler traces what the hooks call."""

    def __init__(self) -> None:
        self.before: list[bool] = []
        self.after: list[bool] = []

    def before_update(self, optimizer: Any) -> None:
        self.before.append(torch.compiler.is_compiling())

    def after_update(self, optimizer: Any) -> None:
        self.after.append(torch.compiler.is_compiling())


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_does_not_look_into_the_hooks() -> None:
    """What a fence does differs from step to step; traced, it would fail or be repeated as it once was."""
    model, optimizer = model_and(torch.optim.AdamW, foreach=True)
    train(model, optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    traced = Traced()
    fence.watch(traced)
    try:
        for _ in range(3):
            compiled()
    finally:
        fence.unwatch(traced)
    assert traced.before == traced.after == [False] * 3


# ---- writes that nobody announced


def write_add(tensor: torch.Tensor) -> None:
    tensor.add_(1)


def write_data(tensor: torch.Tensor) -> None:
    tensor.data.mul_(3)


def write_numpy(tensor: torch.Tensor) -> None:
    tensor.numpy()[:] += 1


def write_dlpack(tensor: torch.Tensor) -> None:
    np.from_dlpack(tensor)
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(tensor)).sub_(5)


def write_storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().copy_(torch.zeros_like(tensor).untyped_storage())


def write_lerp(tensor: torch.Tensor) -> None:
    """An exponential moving average, as EMA helpers do it."""
    torch._foreach_lerp_([tensor], [torch.zeros_like(tensor)], 0.1)


WRITES = [write_add, write_data, write_numpy, write_dlpack, write_storage, write_lerp]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_to_what_has_been_captured_but_not_let_go(
    tmp_path: Path, latch: Held, write: Callable[[torch.Tensor], None]
) -> None:
    """The first tensor is captured, the rest waits: a write to it now is a torn state, and is found by its bytes."""
    state = tensors()
    with ce.Checkpointer(state, tmp_path, file_ops=latch, on_failure=ce.Tolerate(), random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        latch.shut()
        handle = checkpointer.save(2)
        assert latch.reached.wait(WITHIN_S)
        write(state["t0"])
        latch.open()
        error = handle.exception(WITHIN_S)
        assert isinstance(error, TornCapture)
        assert "t0" in str(error)
        assert ce.steps(tmp_path) == [1]
        assert checkpointer.save(3).result(WITHIN_S) == 3
    with ce.open(tmp_path, 3) as checkpoint:
        for name, value in state.items():
            assert torch.equal(checkpoint.read(name), value)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_to_all_of_what_still_waits(tmp_path: Path, latch: Held, write: Callable[[torch.Tensor], None]) -> None:
    state = tensors()
    with ce.Checkpointer(state, tmp_path, file_ops=latch, on_failure=ce.Tolerate(), random=False) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        write(state["t3"])
        latch.open()
        assert isinstance(handle.exception(WITHIN_S), TornCapture)
        assert ce.steps(tmp_path) == []


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_after_a_fence_by_hand_every_write_is_allowed(tmp_path: Path, write: Callable[[torch.Tensor], None]) -> None:
    state = tensors()
    wanted = {}
    with ce.Checkpointer(state, tmp_path, random=False) as checkpointer:
        for step in range(1, 6):
            wanted[step] = {name: value.clone() for name, value in state.items()}
            checkpointer.save(step)
            checkpointer.fence()
            for value in state.values():
                write(value)
    for step, values in wanted.items():
        assert_holds(tmp_path, step, values)


def test_paranoid_finds_one_changed_byte_in_the_middle(tmp_path: Path, latch: Held) -> None:
    state = {"big": torch.zeros(1 << 20, dtype=torch.uint8), "later": torch.zeros(9)}
    with ce.Checkpointer(
        state, tmp_path, file_ops=latch, on_failure=ce.Tolerate(), random=False, paranoid=True
    ) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        state["big"].numpy()[777_777] = 1
        latch.open()
        assert isinstance(handle.exception(WITHIN_S), TornCapture)


# ---- what happens to the tensors themselves


def test_tensors_deleted_re_pointed_or_swapped_while_queued(tmp_path: Path, latch: Held) -> None:
    """The save holds the memory that it was given: what the names point to afterwards does not matter."""
    model, optimizer = model_and(torch.optim.AdamW)
    train(model, optimizer)
    state = {"model": model, "optim": optimizer, "loose": torch.arange(3000.0)}
    wanted = frozen(model, optimizer) | {"loose": torch.arange(3000.0)}
    with ce.Checkpointer(state, tmp_path, file_ops=latch, random=False) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        del state["loose"]
        model[0].weight.data = torch.zeros(48, 24)  # type: ignore[index, union-attr]
        model[3] = nn.Linear(48, 3)  # type: ignore[index]
        optimizer.state.clear()
        junk = [torch.full((3000,), float("nan")) for _ in range(50)]
        latch.open()
        error = handle.exception(WITHIN_S)
        assert error is None or isinstance(error, TornCapture)  # refused or exact, never wrong
        del junk
    if error is None:
        assert_holds(tmp_path, 1, wanted)


def test_swap_tensors_is_not_refused(tmp_path: Path, latch: Held) -> None:
    """Weak references on parameters would make torch refuse; whatever is committed is what was there at save."""
    a, b = torch.arange(3000.0), torch.zeros(3000)
    state = {"a": a}
    with ce.Checkpointer(state, tmp_path, file_ops=latch, random=False, on_failure=ce.Tolerate()) as checkpointer:
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        torch.utils.swap_tensors(a, b)
        latch.open()
        error = handle.exception(WITHIN_S)
        assert error is None or isinstance(error, TornCapture)
    if error is None:
        assert_holds(tmp_path, 1, {"a": torch.arange(3000.0)})


def test_a_storage_that_is_resized_between_fences(tmp_path: Path) -> None:
    """Memory that is freed and made anew, as some wrappers do between steps: what is saved is what is there then."""
    flat = torch.arange(100_000.0)
    state = {"flat": flat, "other": torch.arange(10.0)}
    with ce.Checkpointer(state, tmp_path, random=False) as checkpointer:
        checkpointer.save(1)
        checkpointer.fence()
        nbytes = flat.untyped_storage().nbytes()
        flat.untyped_storage().resize_(0)
        flat.untyped_storage().resize_(nbytes)
        flat.copy_(torch.arange(100_000.0) + 1)
        checkpointer.save(2).result(WITHIN_S)
    assert_holds(tmp_path, 1, {"flat": torch.arange(100_000.0)})
    assert_holds(tmp_path, 2, {"flat": torch.arange(100_000.0) + 1})


def test_a_stalled_save_is_given_up_and_training_goes_on(tmp_path: Path, latch: Held) -> None:
    model, optimizer = model_and(torch.optim.SGD)
    state = {"model": model, "optim": optimizer}
    latch.threshold_bytes = 1
    with ce.Checkpointer(
        state, tmp_path, file_ops=latch, stall_budget_s=0.2, on_failure=ce.Tolerate(), random=False
    ) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        latch.shut()
        handle = checkpointer.save(2)
        assert latch.reached.wait(WITHIN_S)
        done = threading.Event()
        threading.Thread(target=lambda: (train(model, optimizer), done.set()), daemon=True).start()
        stopped_s = time.monotonic()
        finished = done.wait(WITHIN_S)
        latch.open()
        assert finished, f"training was blocked for {time.monotonic() - stopped_s:.1f} s with a budget of 0.2"
        assert isinstance(handle.exception(WITHIN_S), (Stalled, SaveFailed))
        assert checkpointer.save(3).result(WITHIN_S) == 3
    assert ce.steps(tmp_path) == [1, 3]


def test_the_portable_engine_s_bytes_survive_memory_reuse(tmp_path: Path) -> None:
    """Strided tensors are copied before they are digested: the copy must outlive the digest and the write."""
    base = torch.arange(40_000.0).reshape(200, 200)
    state = {"t": base.t(), "cut": base[:, 3:77], "one": base[5]}
    with ce.Checkpointer(state, tmp_path, file_ops=FileOps(), random=False) as checkpointer:
        stop = threading.Event()
        churn = threading.Thread(target=lambda: [torch.full((40_000,), -1.0) for _ in iter(stop.is_set, True)])
        churn.start()
        for step in range(20):
            checkpointer.save(step).result(WITHIN_S)
        stop.set()
        churn.join()
    assert PlainEngine.private
    for step in range(20):
        assert_holds(tmp_path, step, {name: value.contiguous() for name, value in state.items()})


def test_a_hundred_saves_leave_everything_flat(tmp_path: Path) -> None:
    """Descriptors, threads and memory after 100 saves as after the first few (1,000 in bench/soak.py)."""

    import psutil

    model, optimizer = model_and(torch.optim.AdamW, fused=True)
    process = psutil.Process()
    with ce.Checkpointer({"model": model, "optim": optimizer, "pad": torch.zeros(200_000)}, tmp_path) as checkpointer:
        seen: list[tuple[int, int]] = []
        memory: list[int] = []
        for step in range(100):
            train(model, optimizer, step)
            checkpointer.save(step)
            if step % 20 == 19:
                checkpointer.wait()
                seen.append((open_descriptors(), threading.active_count()))
                memory.append(process.memory_info().rss)
        assert len(set(seen)) == 1, seen
        assert memory[-1] - memory[1] < 8 << 20, memory
    assert ce.steps(tmp_path) == list(range(100))
