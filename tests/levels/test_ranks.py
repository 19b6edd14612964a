"""Several ranks carry a step together: what fails on one is tried again by all, in one order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError, CoordinationFailed
from ckptengine.operations.drain import DrainSettings
from ckptengine.operations.levels.levels import Levels
from ckptengine.store.history import History
from ckptengine.store.root import Root

from ..tiers.steps import Threads, landed_of, write_step

SETTINGS = DrainSettings(part_bytes=1 << 20, rank_timeout_s=20)
WITHIN_S = 20.0


def levels_of(tmp_path: Path, retries: int) -> list[Levels]:
    shared: dict[str, bytes] = {}
    policy = ce.Tolerate(retries=retries, backoff_s=0.05, max_backoff_s=0.05)
    return [
        Levels(
            tmp_path / "root",
            [ce.Tier(tmp_path / "disk")],
            port=Threads(rank, 2, shared),
            policy=policy,
            settings=SETTINGS,
        )
        for rank in range(2)
    ]


def fail_uploads(levels: Levels, times: int) -> list[str]:
    """Let the first ``times`` uploads of one rank to the root fail; the names that were asked for."""
    tier = levels._levels[-1].tier
    real = tier.upload
    asked: list[str] = []

    async def upload(name: str, size_bytes: int, part_bytes: int, token: str | None = None) -> object:
        asked.append(name)
        if len(asked) <= times:
            raise ce.CheckpointError("for a while")
        return await real(name, size_bytes, part_bytes, token)

    tier.upload = upload  # type: ignore[method-assign, assignment]
    return asked


@pytest.mark.parametrize("failing", [0, 1])
def test_all_ranks_try_again_together(tmp_path: Path, failing: int) -> None:
    levels = levels_of(tmp_path, retries=5)
    asked = fail_uploads(levels[failing], 2)
    steps = [write_step(tmp_path / "disk", number, world=2, save=number) for number in (1, 2, 3)]
    futures = [each.landed(landed_of(step, rank)) for step in steps for rank, each in enumerate(levels)]
    assert [future.result(WITHIN_S) for future in futures] == [1] * 6
    assert [name.partition("/")[0] for name in asked] == [f"step-{step:09d}" for step in (1, 1, 1, 2, 3)]
    assert sorted(History(Root(tmp_path / "root")).line()) == [1, 2, 3]
    for each in reversed(levels):
        assert each.close(10)


def test_all_ranks_give_up_together(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # other tests of this process have threads too
    levels = levels_of(tmp_path, retries=1)
    fail_uploads(levels[1], 2)
    steps = [write_step(tmp_path / "disk", number, world=2, save=number) for number in (1, 2)]
    first = [each.landed(landed_of(steps[0], rank)) for rank, each in enumerate(levels)]
    second = [each.landed(landed_of(steps[1], rank)) for rank, each in enumerate(levels)]
    assert isinstance(first[0].exception(WITHIN_S), CoordinationFailed)
    assert isinstance(first[1].exception(WITHIN_S), CheckpointError)
    assert [future.result(WITHIN_S) for future in second] == [1, 1]
    assert sorted(History(Root(tmp_path / "root")).line()) == [2]
    for each in reversed(levels):
        assert each.close(10)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("ckptengine")]
