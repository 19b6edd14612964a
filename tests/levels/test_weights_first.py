"""A deadline too short for the whole state: weights are brought to safety before moments, and never as a step."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.operations.stopping.last_save import Pace, weights_root, without_optimizers
from ckptengine.operations.stopping.stopping import Stopping

from .jobs import folder_of
from .test_signals import finish, start, until
from .weights_job import make, moments_of, set_all, weights_of

JOB = Path(__file__).with_name("weights_job.py")
WITHIN_S = 30.0


@pytest.fixture
def survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that a signal would end at the deadline, whatever it does by then, is that of the tests."""
    for what_ends_it in ("_give_up", "_bound_teardown"):
        monkeypatch.setattr(Stopping, what_ends_it, lambda self: None)


def holds(state: dict[str, Any], step: int, *, moments: bool) -> bool:
    (kept,) = state["optimizer"].state.values()
    right = torch.equal(state["model"].weight, weights_of(step)) and state["note"]["step"] == step
    return right and torch.equal(kept["exp_avg"], moments_of(step)) is moments


def test_weights_come_before_moments(tmp_path: Path, memory: str) -> None:
    root, disk = tmp_path / "root", tmp_path / "disk"
    job = start(JOB, root, memory, disk, 90_000, 4)  # the whole state takes about 5 s to the disk
    said = until(job, lambda line: line == "durable 1")
    job.send_signal(signal.SIGTERM)
    more, errors = finish(job, WITHIN_S)
    assert job.returncode == 143, errors
    last = max(int(line.split()[1]) for line in said + more if line.startswith("trained")) + 1
    where = Path(weights_root(str(root), last))
    assert f"the weights of step {last} go first, to {where}" in errors
    assert f"of step {last} the weights are safe, the optimizers' state is not" in errors
    assert ce.steps(root) == [1], "what is there of weights alone is no step"
    assert ce.steps(folder_of(memory))[-1] == last, "the whole was captured before anything else"
    assert ce.steps(where) == [last]
    ce.open(where).verify()

    state = make()
    assert ce.load(state, root) == 1
    assert holds(state, 1, moments=True)
    assert ce.load(state, where, strict=False) == last, "only when it is asked for"
    (kept,) = state["optimizer"].state.values()
    assert holds(state, last, moments=False)
    assert torch.equal(kept["exp_avg"], moments_of(1)), "moments are as they were"
    with pytest.raises(ce.CheckpointError, match="optimizer"):
        ce.load(state, where)

    with ce.Checkpointer(state, root, tiers=[ce.Tier(memory), ce.Tier(disk)], random=False) as checkpointer:
        assert checkpointer.restore() == last
        assert holds(state, last, moments=True)
    assert ce.steps(root) == [1, last]


def test_all_ranks_bring_their_weights_first(tmp_path: Path, memory: str) -> None:
    root = tmp_path / "root"
    job = start(JOB, root, memory, tmp_path / "disk", 45_000, 5, ranks=2)
    until(job, lambda line: line == "durable 1")
    job.send_signal(signal.SIGTERM)
    _, errors = finish(job, 2 * WITHIN_S)
    (where,) = root.glob("weights-only-step-*")
    (last,) = ce.steps(where)
    assert errors.count(f"of step {last} the weights are safe") == 2, errors[-3000:]
    assert ce.steps(root) == [1]
    state = make()
    assert ce.load(state, where, strict=False) == last
    assert torch.equal(state["model"].weight, weights_of(last))


class Hurried(Pace):
    def expected_s(self, size_bytes: int) -> float:
        return 1e9


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("kind", ["directory", "url", "tiers"])
def test_nothing_of_weights_alone_stays_when_the_whole_is_durable(
    tmp_path: Path, memory: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path / "root")
    if kind == "url":
        pytest.importorskip("fsspec", reason="fsspec is not installed")
        root = f"memory://{uuid.uuid4().hex}/run"
    state = make()
    set_all(state, 7)
    tiers = [ce.Tier(memory)] if kind == "tiers" else []
    with (
        caplog.at_level(logging.INFO, "ckptengine"),
        ce.Checkpointer(state, root, tiers=tiers, sigterm_s=WITHIN_S, random=False) as checkpointer,
    ):
        assert checkpointer._last is not None
        checkpointer._last._pace = Hurried()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            checkpointer.step(7)
    assert ended.value.code == 143
    assert f"the weights of step 7 go first, to {weights_root(root, 7)}" in caplog.text
    assert "step 7 is durable, exiting" in caplog.text
    assert ce.steps(root) == [7]
    assert ce.steps(weights_root(root, 7)) == []
    state = make()
    assert ce.load(state, root) == 7
    assert holds(state, 7, moments=True)


@pytest.mark.usefixtures("survives")
def test_enough_time_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = make()
    set_all(state, 3)
    with caplog.at_level(logging.INFO, "ckptengine"), ce.Checkpointer(state, tmp_path, sigterm_s=WITHIN_S) as job:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            job.step(3)
    assert "go first" not in caplog.text
    assert ce.steps(tmp_path) == [3]


def test_a_state_without_optimizers_is_not_cut(tmp_path: Path) -> None:
    with ce.Checkpointer({"a": torch.arange(1000)}, tmp_path, sigterm_s=1) as checkpointer:
        assert checkpointer._last is not None
        checkpointer._last._pace = Hurried()
        assert checkpointer._last._choose({"a": torch.arange(1000)}) is None


def test_names_stay_where_optimizers_are_left_out() -> None:
    state = make()
    nested = {"jobs": [state["optimizer"], {"net": state["model"], "opt": state["optimizer"]}], "x": (1, 2)}
    assert without_optimizers(nested) == {"jobs": [None, {"net": state["model"]}], "x": (1, 2)}


def test_the_pace_is_that_of_the_slowest_of_late() -> None:
    pace = Pace()
    assert pace.expected_s(100_000_000) == 2.0
    for took_s in (9.0, *[1.0] * 7, 3.0):
        handle = ce.SaveHandle(1)
        handle.counters["durable_s"] = took_s
        handle.advance("durable")
        pace.ended(handle)
    assert pace.expected_s(1) == 3.0
