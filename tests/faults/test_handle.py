"""Done callbacks as `concurrent.futures` has them: no lock is held, in order, and an error in one spoils nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import SaveFailed, UnusableRequest
from ckptengine.operations.saving import handle as handles

WITHIN_S = 60.0


@pytest.mark.parametrize("how", ["durable", "skipped", "failed", "ended"])
def test_callbacks_run_without_the_lock(how: str) -> None:
    handle = ce.SaveHandle(3)
    called: list[str] = []
    answers: list[object] = []

    def ask_elsewhere(done: ce.SaveHandle) -> None:
        def ask() -> None:
            answers.extend([done.done(), done.stage, done.exception(WITHIN_S) is None, done.progress is not None])
            done.add_done_callback(lambda _: called.append("from elsewhere"))

        other = threading.Thread(target=ask, daemon=True)
        other.start()
        other.join(WITHIN_S)
        assert not other.is_alive(), "it waits for a lock"
        called.append("first")

    handle.on_done(lambda done: called.append(f"kept before anybody knew: {done.stage}"))
    handle.add_done_callback(ask_elsewhere)
    handle.add_done_callback(lambda done: called.append("second"))
    if how == "failed":
        handle.fail(SaveFailed("no"))
    elif how == "ended":
        handle.advance("captured")
        handle.end()
    else:
        handle.advance(how)  # type: ignore[arg-type]
    stage = "captured" if how == "ended" else how
    assert called == [f"kept before anybody knew: {stage}", "from elsewhere", "first", "second"]
    assert answers == [True, stage, how != "failed", True]


def test_those_who_wait_do_not_wait_for_callbacks() -> None:
    handle = ce.SaveHandle(1)
    free = threading.Event()
    handle.add_done_callback(lambda _: free.wait(WITHIN_S))
    ending = threading.Thread(target=handle.advance, args=("durable",))
    ending.start()
    assert handle.wait("durable", WITHIN_S), "the callback is still at it"
    assert handle.result(WITHIN_S) == 1
    assert ending.is_alive()
    free.set()
    ending.join()


@pytest.mark.parametrize("late", [False, True])
def test_an_error_in_a_callback_is_logged_and_spoils_nothing(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(handles.log, "exception", lambda text, *values: logged.append(text % values))
    handle, called = ce.SaveHandle(1), []
    if late:
        handle.advance("durable")
    handle.add_done_callback(lambda done: called.append(1 // 0))
    handle.add_done_callback(lambda done: called.append(done.step))
    handle.advance("durable")
    assert handle.result() == 1
    assert called == [1]
    assert logged == ["a done callback of the save of step 1 raised"]


def test_a_callback_may_start_the_next_save(tmp_path: Path) -> None:
    more: list[ce.SaveHandle] = []
    with Checkpointer({"t": torch.arange(4.0)}, tmp_path, random=False) as checkpointer:
        first = checkpointer.save(1)
        first.add_done_callback(lambda done: more.append(checkpointer.save(done.step + 1)))
        first.result(WITHIN_S)
        deadline = threading.Event()
        while not more and not deadline.wait(0.01):
            pass
        assert more[0].result(WITHIN_S) == 2
    assert ce.steps(tmp_path) == [1, 2]


def test_what_status_says_is_known_when_the_save_has_ended(tmp_path: Path) -> None:
    with Checkpointer({"t": torch.arange(4.0)}, tmp_path, random=False) as checkpointer:
        for step in range(1, 30):
            checkpointer.save(step).result(WITHIN_S)
            assert checkpointer.status().durable_step == step
            assert checkpointer.status().in_flight == 0


STEPS = [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.int32)]
NO_STEPS = [True, np.True_, torch.tensor(True), 7.0, "7", None, np.float32(7), torch.tensor(7.0), -1, np.int64(-1),
            torch.tensor([7]), np.array([7]), 1 << 63]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{type(step).__module__}-{getattr(step, 'dtype', 'int')}")
def test_a_step_is_any_whole_number(tmp_path: Path, step: int) -> None:
    state = {"t": torch.arange(4.0)}
    with Checkpointer(state, tmp_path, interval=ce.Every(steps=7), random=False) as checkpointer:
        handle = checkpointer.step(step)
        assert handle is not None
        assert type(handle.step) is int
        assert type(handle.result(WITHIN_S)) is int
        assert checkpointer.save(step).result(WITHIN_S) == 7
        assert checkpointer.restore(step) == 7
    assert ce.steps(tmp_path) == [7]
    assert ce.load(state, tmp_path, step) == 7
    assert ce.open(tmp_path, step).step == 7


@pytest.mark.parametrize("step", NO_STEPS, ids=repr)
def test_what_is_no_step(tmp_path: Path, step: int) -> None:
    with Checkpointer({"t": torch.arange(4.0)}, tmp_path, random=False) as checkpointer:
        with pytest.raises(UnusableRequest, match="is not a whole number"):
            checkpointer.save(step)
        if step is not None:
            with pytest.raises(UnusableRequest, match="is not a whole number"):
                checkpointer.restore(step)
        with pytest.raises(UnusableRequest, match="is not a whole number"):
            checkpointer.step(step)
        assert checkpointer.save(1).result(WITHIN_S) == 1
