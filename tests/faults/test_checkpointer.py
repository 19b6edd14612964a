"""The facade when things go wrong around it: other jobs, odd roots, exceptions, forks, ends of processes."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptengine as ce
from ckptengine import checkpointer as facade
from ckptengine.errors import (
    CheckpointError,
    Conflict,
    NotFound,
    RootInUse,
    SaveFailed,
    StateMismatch,
    StorageFailed,
    Superseded,
    UnsupportedValue,
    UnusableRequest,
)
from ckptengine.operations import save as saving
from ckptengine.snapshot import plain
from ckptengine.store.root import Root

from ..descriptors import open_descriptors
from .memory_folder import memory_folder
from .ops import Fault, FaultyOps
from .states import blank, differences, engine_threads, load_exactly, set_state, state_of

WITHIN_S = 60.0


# ---- roots


def test_an_empty_root(tmp_path: Path) -> None:
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path) as checkpointer:
        assert checkpointer.restore() is None
        with pytest.raises(NotFound, match="no committed step 5"):
            checkpointer.restore(5)
    assert differences(state, 1) == []
    assert ce.steps(tmp_path) == []
    assert ce.steps(tmp_path / "absent") == []
    with pytest.raises(CheckpointError):
        ce.load(state, tmp_path)
    with pytest.raises(NotFound):
        ce.open(tmp_path / "absent")


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    for root in (file, file / "below"):
        with pytest.raises(StorageFailed, match="director"):
            ce.Checkpointer(state_of(1), root)
    with pytest.raises(UnusableRequest):
        ce.steps(file)


def test_a_root_that_vanishes_between_saves_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = state_of(1)
    with ce.Checkpointer(state, root, on_failure=ce.Tolerate(), random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        root.rename(tmp_path / "away")
        set_state(state, 2)
        if checkpointer.save(2).exception(WITHIN_S) is None:  # whatever was acknowledged must be there
            assert load_exactly(root) == 2
    assert load_exactly(tmp_path / "away") == 1


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "seteuid"), reason="needs to give up root's rights")
def test_a_root_without_permissions(tmp_path: Path) -> None:
    """Unreadable and read-only roots, as a user that may not pass."""
    root = tmp_path / "root"
    ce.save(state_of(1), root, 1)
    tmp_path.chmod(0o755)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    euid = os.geteuid()
    os.seteuid(65534) if euid == 0 else None
    try:
        with pytest.raises(StorageFailed, match="EACCES"):
            ce.Checkpointer(state_of(1), root)
        assert load_exactly(root) == 1
        with pytest.raises(StorageFailed):
            ce.Checkpointer(state_of(1), root / "step-000000001" / "below")
    finally:
        os.seteuid(euid)
    root.chmod(0)
    os.seteuid(65534) if euid == 0 else None
    try:
        for call in (lambda: ce.steps(root), lambda: ce.load(blank(), root), lambda: ce.Checkpointer(blank(), root)):
            with pytest.raises(CheckpointError):
                call()
    finally:
        os.seteuid(euid)
        root.chmod(0o755)


def test_a_failed_construction_leaves_the_root_free(tmp_path: Path) -> None:
    before = open_descriptors(), engine_threads()
    for _ in range(3):
        with pytest.raises(UnusableRequest):
            ce.Checkpointer(state_of(1), tmp_path, overlap="sometimes")  # type: ignore[arg-type]
    assert (open_descriptors(), engine_threads()) == before
    assert ce.save(state_of(1), tmp_path, 1) == 1


# ---- two jobs


def test_two_jobs_in_one_process(tmp_path: Path) -> None:
    with ce.Checkpointer(state_of(1), tmp_path) as first:
        with pytest.raises(RootInUse):
            ce.Checkpointer(state_of(2), tmp_path)
        refused: list[BaseException] = []

        def other() -> None:
            try:
                ce.save(state_of(2), tmp_path, 2)
            except CheckpointError as error:
                refused.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert [type(error) for error in refused] == [RootInUse]
        first.save(1).result(WITHIN_S)
    assert ce.steps(tmp_path) == [1]
    assert ce.save(state_of(2), tmp_path, 2) == 2


def test_two_jobs_in_two_processes(tmp_path: Path) -> None:
    holder = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.lockf(fd, fcntl.LOCK_EX);"
        "os.write(fd, b'{\"pid\": 1}'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        assert job.stdin is not None
        assert job.stdout.readline() == b"held\n"
        with pytest.raises(RootInUse, match="another live job"):
            ce.Checkpointer(state_of(1), tmp_path)
        job.kill()  # the kernel lets a dead holder's lock go
    assert ce.save(state_of(1), tmp_path, 1) == 1


def test_a_job_that_lost_its_root_does_not_acknowledge(tmp_path: Path) -> None:
    """A newer attempt claims the root behind the lock's back, as after a takeover: the old job's save is refused."""
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, on_failure=ce.Tolerate(), random=False) as old:
        old.save(1).result(WITHIN_S)
        Root(tmp_path).claim(None)
        set_state(state, 2)
        assert isinstance(old.save(2).exception(WITHIN_S), Superseded)
    assert ce.steps(tmp_path) == [1]
    assert load_exactly(tmp_path) == 1


def test_a_claim_between_publishing_and_looking(tmp_path: Path) -> None:
    """The newer attempt listed the manifest before the old job saw the claim: what it inherited must stay whole."""
    claimed: list[int] = []

    class Race(FaultyOps):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            if target.name.startswith("manifest") and "step-000000002" in str(target) and not claimed:
                claimed.append(Root(tmp_path).claim(None).number)

    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, file_ops=Race(), on_failure=ce.Tolerate(), random=False) as old:
        old.save(1).result(WITHIN_S)
        set_state(state, 2)
        assert isinstance(old.save(2).exception(WITHIN_S), Conflict)
    assert claimed
    assert ce.steps(tmp_path) == [1, 2]
    assert load_exactly(tmp_path) == 2


# ---- history


def test_saving_a_step_that_exists(tmp_path: Path) -> None:
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, random=False) as checkpointer:
        checkpointer.save(5).result(WITHIN_S)
        set_state(state, 5)
        checkpointer.save(5).result(WITHIN_S)
    assert load_exactly(tmp_path) == 5
    assert ce.steps(tmp_path) == [5]


def test_abandoned_steps_are_never_the_newest_again(tmp_path: Path) -> None:
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path, random=False) as checkpointer:
        for step in (10, 20, 30):
            set_state(state, step)
            checkpointer.save(step).result(WITHIN_S)
        assert checkpointer.restore(10) == 10
        assert differences(state, 10) == []
        assert ce.steps(tmp_path) == [10]
        set_state(state, 11)
        checkpointer.save(11).result(WITHIN_S)
    assert ce.steps(tmp_path) == [10, 11]
    assert load_exactly(tmp_path) == 11
    with ce.Checkpointer(state, tmp_path, random=False) as checkpointer:
        assert checkpointer.restore() == 11
        with pytest.raises(NotFound):
            checkpointer.restore(30)
        set_state(state, 20)
        checkpointer.save(20).result(WITHIN_S)
    assert ce.steps(tmp_path) == [10, 11, 20]
    assert load_exactly(tmp_path, 20) == 20


def test_a_job_that_forgot_to_restore_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptengine")
    for step in (10, 20, 30):
        ce.save(state_of(step), tmp_path, step)
    for first in (30, 40):
        with ce.Checkpointer(state_of(first), tmp_path, random=False) as checkpointer:
            checkpointer.save(first).result(WITHIN_S)
    with ce.Checkpointer(state_of(0), tmp_path, random=False) as checkpointer:
        assert checkpointer.restore(30) == 30
        checkpointer.save(31).result(WITHIN_S)
    assert not caplog.records
    with ce.Checkpointer(state_of(10), tmp_path, random=False) as checkpointer:
        checkpointer.save(10).result(WITHIN_S)
        checkpointer.save(11).result(WITHIN_S)
    (told,) = caplog.messages
    assert "restored nothing and saves step 10: steps beyond it, up to 31, are an abandoned line" in told
    assert ce.steps(tmp_path) == [10, 11]


def test_one_step_is_no_root(tmp_path: Path) -> None:
    ce.save(state_of(1), tmp_path, 1)
    step = tmp_path / "step-000000001"
    before = sorted(step.iterdir())
    for more in ({}, {"keep": ce.Keep(last=1)}):
        with pytest.raises(UnusableRequest, match="is one step of the root"):
            ce.Checkpointer(state_of(1), step, **more)
    assert sorted(step.iterdir()) == before


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ce.Checkpointer(state_of(1), "root", interval=ce.Every(steps=1), random=False) as checkpointer:
        monkeypatch.chdir("elsewhere")
        checkpointer.save(1).result(WITHIN_S)
    assert (tmp_path / "root/.policy.json").is_file()
    assert not list(Path("elsewhere").glob("*"))


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(0), np.zeros((2, 2)), 1j, "low", None])
def test_metrics_that_are_no_number(tmp_path: Path, value: Any) -> None:
    with ce.Checkpointer(state_of(1), tmp_path) as checkpointer:
        with pytest.raises(UnsupportedValue, match=r"metrics\['loss'\] is "):
            checkpointer.save(1, metrics={"loss": value})
        checkpointer.save(2, metrics={"loss": torch.zeros(1, 1), "other": np.float32(2)}).result(WITHIN_S)
    assert ce.open(tmp_path).metrics == {"loss": 0.0, "other": 2.0}


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None, 1 << 63])
def test_steps_that_are_none(tmp_path: Path, step: Any) -> None:
    with ce.Checkpointer(state_of(1), tmp_path) as checkpointer, pytest.raises(UnusableRequest):
        checkpointer.save(step)


# ---- state that does not fit


def test_every_difference_in_one_report_and_nothing_changed(tmp_path: Path) -> None:
    ce.save(state_of(1), tmp_path, 1)
    state = blank()
    state["half"] = state["tied"] = torch.zeros(700, dtype=torch.float16)
    state["bits"] = torch.zeros(34, dtype=torch.bool)
    state["extra"] = torch.zeros(3)
    state["ghost"] = torch.empty(4, device="meta")
    del state["wide"]
    kept = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor) and name != "ghost"}
    with pytest.raises(StateMismatch) as caught:
        ce.load(state, tmp_path)
    told = "\n".join(caught.value.problems)
    for name in ("half", "bits", "extra", "ghost", "wide"):
        assert name in told, told
    assert "meta" in told
    assert "nothing was changed" in str(caught.value)
    for name, value in kept.items():
        assert torch.equal(state[name], value)
    assert state["at"] == state_of(987_654)["at"]


def test_an_unsupported_value_names_its_path(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(3)}, "bad": {"inner": [1, object()]}}
    with ce.Checkpointer(state, tmp_path) as checkpointer, pytest.raises(UnsupportedValue, match=r"bad\.inner"):
        checkpointer.save(1)
    assert ce.steps(tmp_path) == []


# ---- ends


def test_an_exception_in_the_loop_is_not_masked_and_close_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that hangs: the loop's own exception comes out, soon, and no handle is left without an end."""
    monkeypatch.setattr(facade, "CLOSE_AFTER_ERROR_S", 0.3)
    monkeypatch.setattr(saving, "CANCEL_S", 0.2)
    monkeypatch.setattr(plain, "CLOSE_S", 0.2)
    ops = FaultyOps()
    handle = None
    started_s = time.monotonic()
    with (
        pytest.raises(ZeroDivisionError),
        ce.Checkpointer(state_of(1), tmp_path, file_ops=ops, random=False) as checkpointer,
    ):
        checkpointer.save(1).result(WITHIN_S)
        ops.arm(Fault(6, "delay", delay_s=60, sticky=True))
        handle = checkpointer.save(2)
        raise ZeroDivisionError
    assert time.monotonic() - started_s < 5
    assert handle is not None
    assert isinstance(handle.exception(0), SaveFailed)
    ops.wake.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ckptengine"):
            thread.join(WITHIN_S)
    assert load_exactly(tmp_path, 1) == 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ValueError])
def test_what_is_in_flight_is_finished_when_the_loop_ends_with(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), ce.Checkpointer(state_of(4), tmp_path, random=False) as checkpointer:
        checkpointer.save(4)
        raise kind
    assert load_exactly(tmp_path) == 4


def test_a_failure_while_closing_goes_with_the_loop_s_exception(tmp_path: Path) -> None:
    ops = FaultyOps()
    with pytest.raises(ZeroDivisionError), ce.Checkpointer(state_of(1), tmp_path, file_ops=ops) as checkpointer:
        ops.arm(Fault(8, "fail", errno.ENOSPC))
        checkpointer.save(1)
        raise ZeroDivisionError
    refused = pytest.raises(SaveFailed, match="ENOSPC")
    with refused, ce.Checkpointer(state_of(1), tmp_path, file_ops=ops) as checkpointer:
        ops.arm(Fault(8, "fail", errno.ENOSPC))
        checkpointer.save(1)


def test_a_pending_error_surfaces_in_the_hook_once(tmp_path: Path) -> None:
    ops = FaultyOps()
    checkpointer = ce.Checkpointer(state_of(1), tmp_path, file_ops=ops, interval=ce.Every(steps=1))
    ops.arm(Fault(8, "fail", errno.EIO))
    handle = checkpointer.save(1)
    error = handle.exception(WITHIN_S)
    assert isinstance(error, SaveFailed)
    with pytest.raises(SaveFailed) as caught:
        checkpointer.step(2)
    assert caught.value is error
    later = checkpointer.step(3)
    assert later is not None
    assert later.result(WITHIN_S) == 3
    checkpointer.close()


def test_a_collected_checkpointer_finishes_and_lets_go(tmp_path: Path) -> None:
    threads, descriptors = engine_threads(), open_descriptors()
    checkpointer = ce.Checkpointer(state_of(6), tmp_path, random=False)
    handle = checkpointer.save(6)
    del checkpointer
    gc.collect()
    assert handle.result(WITHIN_S) == 6
    assert engine_threads() == threads
    assert open_descriptors() == descriptors
    assert load_exactly(tmp_path) == 6
    assert ce.save(state_of(7), tmp_path, 7) == 7


def test_closed_is_closed(tmp_path: Path) -> None:
    checkpointer = ce.Checkpointer(state_of(1), tmp_path)
    checkpointer.close()
    checkpointer.close()
    for call in (lambda: checkpointer.save(1), lambda: checkpointer.step(1), checkpointer.restore):
        with pytest.raises(UnusableRequest, match="closed"):
            call()
    checkpointer.fence()  # hooks of optimizers may still come


def test_overlap_latest_gives_up_the_one_in_flight_without_an_error(tmp_path: Path) -> None:
    ops = FaultyOps()
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, file_ops=ops, overlap="latest", random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        ops.arm(Fault(6, "delay", delay_s=0.2))
        early = checkpointer.save(2)
        late = checkpointer.save(3)
        assert late.result(WITHIN_S) == 3
        assert early.done()
        assert early.stage in ("skipped", "durable")
        assert early.exception(0) is None
        checkpointer.step(4)


def test_overlap_skip(tmp_path: Path) -> None:
    ops = FaultyOps()
    with ce.Checkpointer(state_of(1), tmp_path, file_ops=ops, overlap="skip", random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        ops.arm(Fault(4, "delay", delay_s=0.3))
        first = checkpointer.save(2)
        second = checkpointer.save(3)
        assert second.stage == "skipped"
        assert not second.wait("committed", 1)
        assert first.result(WITHIN_S) == 2
    assert ce.steps(tmp_path) == [1, 2]


SCRIPT = """
import json, os, signal, sys, time, warnings
warnings.simplefilter("error")
import torch, ckptengine as ce
root, what = sys.argv[1:]
state = {"w": torch.arange(3_000_000, dtype=torch.int32), "at": 7}
checkpointer = ce.Checkpointer(state, root, random=False)
checkpointer.save(1).result(30)
if what == "exit":
    checkpointer.save(7)
elif what == "raise":
    checkpointer.save(7)
    raise KeyError("loop")
elif what == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored
    try:
        with checkpointer:
            checkpointer.save(7)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
    except KeyboardInterrupt:
        print("interrupted")
elif what == "fork":
    warnings.simplefilter("ignore")
    checkpointer.save(7)
    child = os.fork()
    if child == 0:
        optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        try:
            checkpointer.save(8)
        except ce.CheckpointError as error:
            print("child:", error.code, flush=True)
        checkpointer.close()
        del checkpointer
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert checkpointer.save(9).result(30) == 9
    checkpointer.close()
print("steps", ce.steps(root), flush=True)
"""


ENDS = {"exit": (0, 7), "raise": (1, 7), "interrupt": (0, 7), "fork": (0, 9)}


@pytest.fixture(scope="module")
def ended() -> Iterator[Callable[[str], tuple[Path, int, str, str]]]:
    """Processes that end with a save in flight, all started at once: (root, exit status, output, errors) of each."""
    with memory_folder() as folder:
        running = {
            what: subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(folder / what), what],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for what in ENDS
        }  # fmt: skip

        def result(what: str) -> tuple[Path, int, str, str]:
            output, errors = running[what].communicate(timeout=90)
            return folder / what, running[what].returncode, output, errors

        yield result
        for process in running.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("what", list(ENDS))
def test_the_end_of_a_process_with_a_save_in_flight(
    ended: Callable[[str], tuple[Path, int, str, str]], what: str
) -> None:
    root, returncode, output, errors = ended(what)
    status, steps = ENDS[what]
    assert returncode == status, errors
    assert "Fatal" not in errors
    assert ("Traceback" in errors) == (what == "raise"), errors
    if what == "fork":
        assert "child: unusable-request" in output
    with ce.open(root) as checkpoint:
        assert checkpoint.step == steps
        checkpoint.verify()
        assert torch.equal(checkpoint.read("w"), torch.arange(3_000_000, dtype=torch.int32))
    assert json.loads((root / ".lock").read_text())["pid"] > 0


# ---- what a save tells


def test_the_trace_shows_every_byte_being_written(tmp_path: Path) -> None:
    with ce.Checkpointer({"weight": torch.arange(3 << 20)}, tmp_path) as checkpointer:
        handle = checkpointer.save(1)
        handle.result(WITHIN_S)
    events = json.loads(json.dumps(handle.trace()))["traceEvents"]
    names = {event["name"] for event in events}
    assert names >= {"save", "capture", "seal", "commit", "write"}
    written = [event for event in events if event["name"] == "write"]
    assert sum(event["args"]["bytes"] for event in written) == handle.progress["written_bytes"] >= 24 << 20
    capture = next(event for event in events if event["name"] == "capture")
    commit = next(event for event in events if event["name"] == "commit")
    for event in written:  # one clock for all threads
        assert capture["ts"] - 1e6 < event["ts"] < commit["ts"]
