"""Ctrl-C, and other threads, at the worst moments of what runs on the training thread."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import SaveFailed, Stalled, TornCapture
from ckptengine.operations.saving.in_flight import InFlight
from ckptengine.snapshot import fence, waiting
from ckptengine.snapshot.capture import Capture

from .test_guard import Held, latch, tensors  # noqa: F401
from .test_witness import registered

WITHIN_S = 60.0


@contextmanager
def before_every_line(files: set[str] | None, call: Callable[[], None]) -> Iterator[None]:
    """Have ``call`` run before every line of Python that this thread runs, in ``files`` only where given."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if files is not None and frame.f_code.co_filename not in files:
            return None
        if event == "line":
            call()
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(former)


def waits_for_a_handle() -> Callable[[], object]:
    handle = ce.SaveHandle(1)
    return lambda: handle.wait("durable", 0.002)


def waits_for_room() -> Callable[[], object]:
    flight = InFlight()
    return lambda: flight.wait_below(0, 0.002)


@pytest.mark.parametrize("waits", [waits_for_a_handle, waits_for_room])
def test_a_wait_that_is_interrupted_ends_as_an_interrupt(waits: Callable[[], Callable[[], object]]) -> None:
    files = {str(threading.__file__), str(waiting.__file__)}
    for number in range(1, 200):
        left, wait = number, waits()

        def interrupt() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        try:
            with before_every_line(files, interrupt):
                wait()
        except KeyboardInterrupt:
            wait()  # as if nothing had been
            continue
        break
    assert 5 < number < 199


def test_time_out_of_range_is_for_ever() -> None:
    handle = ce.SaveHandle(1)
    threading.Timer(0.02, handle.advance, args=("durable",)).start()
    assert handle.wait("durable", float("inf"))


class Watcher:
    def before_update(self, optimizer: object) -> None: ...

    def after_update(self, optimizer: object) -> None: ...


def test_an_update_while_other_threads_watch() -> None:
    watchers = [Watcher() for _ in range(3)]
    coming: list[Watcher] = []

    def another() -> None:
        coming.append(Watcher())
        fence.watch(coming[-1])

    try:
        for watcher in watchers:
            fence.watch(watcher)
        with before_every_line(None, another):
            fence.before_any_update()
        assert coming
    finally:
        for watcher in [*watchers, *coming]:
            fence.unwatch(watcher)


class CapturedJob:
    """All is captured, and nothing of it differs by its bytes."""

    def wait_captured(self, extents: object = None, timeout_s: float | None = None) -> bool:
        return True

    def recheck(self, extents: object, samples: int | None) -> list[int]:
        return []


class Meanwhile:
    """An object of the state that has a function run on another thread while its state is read."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def state_dict(self) -> dict[str, int]:
        if self.call is not None:
            thread = threading.Thread(target=self.call)
            self.call = None
            thread.start()
            thread.join()
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def test_an_update_on_another_thread_while_a_save_is_registered(tmp_path: Path) -> None:
    """What was read before the update must not be committed beside what is read after it."""
    weights, others = (torch.nn.Parameter(torch.zeros(5000)) for _ in range(2))
    mine, foreign = (torch.optim.SGD([one], lr=1.0, foreach=True) for one in (weights, others))
    state: dict[str, Any] = {"w": weights, "updates": 0, "meanwhile": None}

    def update(optimizer: torch.optim.Optimizer) -> None:
        for parameter in (weights, others):
            parameter.grad = torch.ones(5000)
        optimizer.step()
        state["updates"] += 1

    with ce.Checkpointer(state, tmp_path, on_failure=ce.Tolerate(), random=False) as checkpointer:
        for step, optimizer in enumerate((mine, foreign, mine), 1):
            state["meanwhile"] = Meanwhile(lambda by=optimizer: update(by))  # type: ignore[misc]
            error = checkpointer.save(step).exception(WITHIN_S)
            assert isinstance(error, TornCapture) if optimizer is mine else error is None
        state["meanwhile"] = None
        checkpointer.save(4).wait("durable", WITHIN_S)
        update(mine)  # after it, as ever
    with ce.open(tmp_path, 4) as checkpoint:
        assert checkpoint.read("w").unique().tolist() == [-2.0]


class Halves(torch.optim.Optimizer):
    """Its step changes one parameter, waits, and changes the other."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.half, self.go_on = threading.Event(), threading.Event()

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        first, second = self.param_groups[0]["params"]
        first.data.add_(1)
        self.half.set()
        self.go_on.wait(WITHIN_S)
        second.data.add_(1)


def test_a_save_in_the_middle_of_an_update_on_another_thread(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.zeros(5000)) for _ in range(2)]
    optimizer = Halves(weights)
    with ce.Checkpointer({"w": weights}, tmp_path, on_failure=ce.Tolerate(), random=False) as checkpointer:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        assert optimizer.half.wait(WITHIN_S)
        error = checkpointer.save(1).exception(WITHIN_S)
        optimizer.go_on.set()
        thread.join(WITHIN_S)
        assert isinstance(error, TornCapture)
        checkpointer.save(2).wait("durable", WITHIN_S)
    assert not fence.under_way_elsewhere()
    assert not fence._under_way


def test_an_interrupt_does_not_lose_that_a_capture_is_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"t": torch.zeros(9)}
    taken = Capture(CapturedJob(), *registered(state))  # type: ignore[arg-type]
    state["t"].add_(1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Capture, "_tear", interrupted)
        taken.fence(None, None)
    taken.finish()
    assert isinstance(taken.error, TornCapture)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_capture_that_comes_as_the_stall_budget_ends(
    tmp_path: Path,
    latch: Held,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was not there in time, and is there when it is looked for: the update may not pass it by."""
    state = tensors()
    with ce.Checkpointer(
        state, tmp_path, on_failure=ce.Tolerate(), file_ops=latch, random=False, stall_budget_s=0.05
    ) as checkpointer:
        flight = checkpointer._saver._flight

        def late(job: Any, timeout_s: float | None) -> bool:
            InFlight.wait_ready(flight, job, WITHIN_S)
            return False

        monkeypatch.setattr(flight, "wait_ready", late)
        latch.shut()
        handle = checkpointer.save(1)
        assert latch.reached.wait(WITHIN_S)
        checkpointer.fence()
        latch.open()
        assert isinstance(handle.exception(WITHIN_S), (Stalled, SaveFailed))
    assert ce.steps(tmp_path) == []


def test_what_a_callback_refers_to_is_let_go(tmp_path: Path) -> None:
    class Trainer:
        """Holds what holds its saves: only collecting garbage ends it."""

    trainer: Any = Trainer()
    gone = weakref.ref(trainer)
    called = threading.Event()
    trainer.checkpointer = ce.Checkpointer({"w": torch.arange(9)}, tmp_path, random=False)
    handle = trainer.checkpointer.save(1)
    handle.add_done_callback(lambda _, trainer=trainer: called.set())
    assert called.wait(WITHIN_S)
    del trainer, handle
    until_s = time.monotonic() + WITHIN_S
    while gone() is not None and time.monotonic() < until_s:
        gc.collect()
    assert gone() is None
