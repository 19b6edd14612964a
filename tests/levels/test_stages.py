"""How far each save goes, what its handle says meanwhile, and what a hop that fails does."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import RootInUse, SaveFailed, StorageFailed, UnusableRequest

from .jobs import folder_of, is_exactly, run_steps, set_state, state_of

WITHIN_S = 20.0


def test_each_save_goes_as_far_as_it_is_wanted(tmp_path: Path, memory: str) -> None:
    tiers = [ce.Tier(memory, interval=ce.Every(steps=1)), ce.Tier(tmp_path / "disk", interval=ce.Every(steps=2))]
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path / "root", tiers=tiers, interval=ce.Every(steps=4)) as checkpointer:
        assert checkpointer.restore() is None
        handles = run_steps(checkpointer, state, range(1, 9))
        assert checkpointer.wait()
        stages = [handle.stage for handle in handles if handle is not None]
        assert stages == ["captured", "committed", "captured", "durable"] * 2, "host memory is never called committed"
        for handle in handles:
            assert handle is not None
            assert handle.done()
            assert handle.exception() is None
            assert handle.result() == handle.step
            assert handle.wait("durable") == (handle.step % 4 == 0)
        set_state(state, 9)
        assert checkpointer.save(9).result(WITHIN_S) == 9, "an explicit save goes all the way"
    assert ce.steps(tmp_path / "root") == [4, 8, 9]
    assert ce.steps(tmp_path / "disk") == [9], "a tier keeps its newest"
    assert ce.steps(folder_of(memory)) == [9]
    loaded = state_of(0)
    assert ce.load(loaded, tmp_path / "root", 4) == 4
    assert is_exactly(loaded, 4)


def test_stages_come_with_the_tiers(tmp_path: Path, memory: str) -> None:
    """A slow root: the save is committed as soon as it is on the disk before it."""
    slow = ce.Tier(tmp_path / "slow", max_bytes_per_s=300_000)
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path / "root", tiers=[ce.Tier(memory), slow]) as checkpointer:
        handle = checkpointer.save(1)
        assert handle.wait("captured", WITHIN_S)
        assert not handle.wait("committed", 0.1)
        assert ce.steps(folder_of(memory)) == [1], "it is in memory"
        assert handle.wait("committed", WITHIN_S)
        assert ce.steps(tmp_path / "slow") == [1]
        assert handle.result(WITHIN_S) == 1
        assert not checkpointer.wait("durable", 0.0) or handle.stage == "durable"


def test_without_tiers_nothing_of_them_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys, torch, ckptengine as ce\n"
        "for name in ('aiofiles', 'fsspec', 'aiohttp', 'prometheus_client', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "state = {'a': torch.ones(3)}\n"
        "for keep in (None, ce.Keep(last=1)):\n"
        "    with ce.Checkpointer(state, sys.argv[1], keep=keep) as checkpointer:\n"
        "        checkpointer.save(1); checkpointer.save(2); checkpointer.wait()\n"
        "print(ce.steps(sys.argv[1]))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2]\n"


def test_a_root_in_memory_is_refused(memory: str) -> None:
    with pytest.raises(UnusableRequest, match="ever committed"):
        ce.Checkpointer(state_of(1), memory)


def test_a_failed_construction_frees_everything(tmp_path: Path, memory: str) -> None:
    first = ce.Checkpointer(state_of(1), tmp_path / "root", tiers=[ce.Tier(memory)])
    with pytest.raises(RootInUse):
        ce.Checkpointer(state_of(1), tmp_path / "root", tiers=[ce.Tier(tmp_path / "other")])
    with pytest.raises(RootInUse):
        ce.Checkpointer(state_of(1), tmp_path / "root2", tiers=[ce.Tier(memory)])
    first.close()
    for tier in (memory, str(tmp_path / "other")):
        ce.save(state_of(1), tmp_path / "root", 1, tiers=[ce.Tier(tier)])


def test_a_tier_that_fails_is_raised_at_the_next_hook(tmp_path: Path, memory: str) -> None:
    state = state_of(1)
    checkpointer = ce.Checkpointer(state, tmp_path / "root", tiers=[ce.Tier(tmp_path / "disk")])
    checkpointer.save(1).result(WITHIN_S)
    _break(tmp_path / "root")
    handle = checkpointer.save(2)
    assert isinstance(handle.exception(WITHIN_S), StorageFailed)
    assert handle.stage == "failed"
    assert handle.wait("committed", 0), "the disk has it, whatever became of the root"
    with pytest.raises(StorageFailed):
        handle.result()
    with pytest.raises(StorageFailed):
        checkpointer.step(3)
    checkpointer.close()
    assert ce.steps(tmp_path / "disk") == [2]


def test_a_tier_that_fails_for_a_while_is_tolerated(
    tmp_path: Path, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(0)
    tolerate = ce.Tolerate(retries=50, backoff_s=0.05, max_backoff_s=0.05)
    tiers = [ce.Tier(memory), ce.Tier(tmp_path / "disk")]
    with (
        caplog.at_level(logging.WARNING, "ckptengine"),
        ce.Checkpointer(
            state, tmp_path / "root", tiers=tiers, interval=ce.Every(steps=1), on_failure=tolerate
        ) as checkpointer,
    ):
        run_steps(checkpointer, state, range(1, 2))
        checkpointer.wait()
        _break(tmp_path / "root")
        handles = run_steps(checkpointer, state, range(2, 5))
        assert all(handle is not None and handle.wait("committed", WITHIN_S) for handle in handles)
        assert not any(handle is not None and handle.done() for handle in handles)
        deadline_s = time.monotonic() + WITHIN_S
        while "next try" not in caplog.text:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        _mend(tmp_path / "root")
        assert checkpointer.wait("durable", WITHIN_S)
        assert [handle.stage for handle in handles if handle is not None] == ["durable"] * 3
    assert ce.steps(tmp_path / "root") == [1, 2, 3, 4]


def test_tolerance_ends_where_nothing_durable_is_young_enough(tmp_path: Path) -> None:
    state = state_of(0)
    tolerate = ce.Tolerate(max_age_steps=3, retries=0)
    checkpointer = ce.Checkpointer(
        state,
        tmp_path / "root",
        tiers=[ce.Tier(tmp_path / "disk")],
        interval=ce.Every(steps=1),
        on_failure=tolerate,
    )
    run_steps(checkpointer, state, range(1, 2))
    checkpointer.wait()
    _break(tmp_path / "root")
    for step in range(2, 5):
        (handle,) = run_steps(checkpointer, state, range(step, step + 1))
        assert handle is not None
        assert handle.exception(WITHIN_S) is not None
    with pytest.raises(StorageFailed):
        run_steps(checkpointer, state, range(5, 6))
    checkpointer.close()


def test_tolerance_ends_also_while_a_step_is_tried_again(tmp_path: Path) -> None:
    """Tries that go on for ever end with no failure: the age counts all the same, and what went wrong can be seen."""
    state = state_of(0)
    checkpointer = ce.Checkpointer(
        state,
        tmp_path / "root",
        tiers=[ce.Tier(tmp_path / "disk")],
        interval=ce.Every(steps=1),
        on_failure=ce.Tolerate(max_age_steps=3, retries=10**6, backoff_s=0.02, max_backoff_s=0.02),
    )
    run_steps(checkpointer, state, range(1, 2))
    checkpointer.wait()
    _break(tmp_path / "root")
    (handle,) = run_steps(checkpointer, state, range(2, 3))
    assert handle is not None
    deadline_s = time.monotonic() + WITHIN_S
    while handle.trouble is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert isinstance(handle.trouble, StorageFailed)
    assert handle.progress["retries"] >= 1
    assert not handle.done()
    run_steps(checkpointer, state, range(3, 5))
    with pytest.raises(StorageFailed) as raised:
        run_steps(checkpointer, state, range(5, 6))
    assert raised.value.__notes__ == [
        "raised now because the newest durable checkpoint is 4 steps old, more than the 3 that are tolerated"
    ]
    status = checkpointer.status()
    assert (status.failures, status.ended) == (0, {"durable": 1})
    assert status.retries >= 1
    assert "storage-failed" in (status.last_error or "")
    _mend(tmp_path / "root")
    assert checkpointer.wait("durable", WITHIN_S)
    assert handle.trouble is None
    checkpointer.close()
    assert ce.steps(tmp_path / "root") == [1, 2, 3, 4]


def test_a_failure_that_something_newer_has_made_good_is_not_raised_later(tmp_path: Path) -> None:
    state = state_of(0)
    checkpointer = ce.Checkpointer(
        state,
        tmp_path / "root",
        tiers=[ce.Tier(tmp_path / "disk")],
        on_failure=ce.Tolerate(max_age_steps=10, retries=0),
    )
    checkpointer.save(1).result(WITHIN_S)
    _break(tmp_path / "root")
    assert checkpointer.save(2).exception(WITHIN_S) is not None
    _mend(tmp_path / "root")
    checkpointer.save(3).result(WITHIN_S)
    assert checkpointer.step(100) is None, "no save is due, and the newest one that was asked for is durable"
    checkpointer.close()


def test_progress_says_how_far_a_step_has_come_to_the_next_tier(tmp_path: Path) -> None:
    state = state_of(0)
    slow = ce.Tier(tmp_path / "disk", max_bytes_per_s=300_000)
    with ce.Checkpointer(state, tmp_path / "root", tiers=[ce.Tier(tmp_path / "fast"), slow]) as checkpointer:
        handle = checkpointer.save(1)
        while "carried_bytes" not in (seen := handle.progress):
            assert not handle.done()
            time.sleep(0.005)
        assert seen["carried_bytes"] > state["big"].nbytes
        assert 0 <= seen["arrived_bytes"] <= seen["carried_bytes"]
        handle.result(WITHIN_S)
        assert "carried_bytes" not in handle.progress, "it is under way no more"


def test_close_gives_up_what_does_not_arrive_in_time(tmp_path: Path) -> None:
    state = state_of(1)
    slow = tmp_path / "root"
    checkpointer = ce.Checkpointer(
        state, slow, tiers=[ce.Tier(tmp_path / "disk"), ce.Tier(tmp_path / "b", max_bytes_per_s=1000)]
    )
    handle = checkpointer.save(1)
    assert handle.wait("committed", WITHIN_S)
    began_s = time.monotonic()
    with pytest.raises(SaveFailed, match="still on"):
        checkpointer.close(0.5)
    assert time.monotonic() - began_s < 10
    assert handle.stage == "failed"
    assert ce.steps(tmp_path / "disk") == [1]


def test_a_checkpointer_that_nobody_closes_ends_durable(tmp_path: Path, memory: str) -> None:
    program = (
        "import sys, torch, ckptengine as ce\n"
        "state = {'a': torch.arange(100000)}\n"
        "checkpointer = ce.Checkpointer(state, sys.argv[1], tiers=[ce.Tier(sys.argv[2]), ce.Tier(sys.argv[3])])\n"
        "checkpointer.save(5)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "root"), memory, str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ce.steps(tmp_path / "root") == [5]


def _break(root: Path) -> None:
    root.rename(root.with_name("away"))
    root.write_bytes(b"no directory")


def _mend(root: Path) -> None:
    root.unlink()
    root.with_name("away").rename(root)
