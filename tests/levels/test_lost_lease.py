"""A job whose lease of a remote root is lost commits and removes nothing there; the tiers before it go on."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="fsspec is not installed")

import fsspec

import ckptengine as ce
from ckptengine.errors import SaveFailed, Superseded
from ckptengine.operations.levels import held as levels_held
from ckptengine.tiers.lease import Lease, LeaseTimes

from .jobs import run_steps, state_of

WITHIN_S = 20.0


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def objects(url: str) -> set[str]:
    found = fsspec.filesystem("memory").find(url.removeprefix("memory:/"))
    return {name for name in found if "/lease/" not in name}


def until(wanted: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    while not wanted():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def lease_of(checkpointer: ce.Checkpointer) -> Lease:
    levels = checkpointer._places.levels
    assert levels is not None
    (lease,) = levels._held._leases.values()
    return lease


@pytest.mark.parametrize("how", ["not renewed", "taken"])
def test_a_lost_lease_commits_nothing(tmp_path: Path, url: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = LeaseTimes(renew_s=3600 if how == "not renewed" else 0.05, expiry_s=0.5, poll_s=0.05)
    monkeypatch.setattr(levels_held, "Lease", functools.partial(Lease, times=times))
    state = state_of(0)
    disk = ce.Tier(tmp_path / "disk")
    fast = ce.Tier(tmp_path / "fast")
    tolerant = ce.Tolerate(retries=2, backoff_s=0.01)
    with ce.Checkpointer(state, url, tiers=[fast, disk], keep=ce.Keep(last=1), on_failure=tolerant) as checkpointer:
        if how == "not renewed":
            lease_of(checkpointer)._times = LeaseTimes(expiry_s=3600)
        checkpointer.save(1).result(WITHIN_S)
        before = objects(url)
        if how == "taken":
            memory = fsspec.filesystem("memory")
            for name in memory.find(url.removeprefix("memory:/")):
                if "/lease/" in name:
                    memory.rm(name)
        else:
            lease_of(checkpointer)._times = times
        until(lambda: lease_of(checkpointer).lost)
        handle = checkpointer.save(2)
        error = handle.exception(WITHIN_S)
        assert isinstance(error, Superseded if how == "taken" else SaveFailed)
        assert "lease" in str(error)
        assert url.removeprefix("memory:/") in str(error)
        assert handle.wait("committed", 0), "it is on the disk, which nobody else holds"
        assert ce.steps(tmp_path / "disk") == [2]
        assert ce.steps(url) == [1]
        assert {name for name in before if "step-" in name} <= objects(url), "and nothing was removed"
        if how == "not renewed":  # the place can be reached again
            lease_of(checkpointer)._put()
            lease_of(checkpointer)._times = LeaseTimes(expiry_s=3600)
            checkpointer.save(3).result(WITHIN_S)
            until(lambda: ce.steps(url) == [3])
    leases = [name for name in fsspec.filesystem("memory").find(url.removeprefix("memory:/")) if "/lease/" in name]
    assert len(leases) <= 1


def test_a_lost_lease_spoils_no_training_of_the_tiers_before_it(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels_held, "Lease", functools.partial(Lease, times=LeaseTimes(renew_s=3600, expiry_s=0.0)))
    state = state_of(0)
    tiers = [ce.Tier(tmp_path / "fast"), ce.Tier(tmp_path / "disk", keep=ce.Keep(last=2))]
    with ce.Checkpointer(
        state, url, tiers=tiers, interval=ce.Every(steps=1), on_failure=ce.Tolerate(retries=0)
    ) as checkpointer:
        handles = run_steps(checkpointer, state, range(1, 5))
        for handle in handles:
            assert handle is not None
            assert isinstance(handle.exception(WITHIN_S), SaveFailed)
        assert ce.steps(tmp_path / "disk") == [3, 4]
        assert checkpointer.status().failures == 4
    assert ce.steps(url) == []
