"""What a dead job left on its tiers is carried on to the root by the next one, whatever the intervals say."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.coordination.alone import Alone
from ckptengine.operations.drain import DrainSettings
from ckptengine.operations.levels.levels import Levels
from ckptengine.store.history import CommitRef, History
from ckptengine.store.root import Root

from ..tiers.steps import Step, Threads, write_step
from .jobs import flip, folder_of, is_exactly, run_steps, state_of

WITHIN_S = 20.0


def places(tmp_path: Path, memory: str) -> list[ce.Tier]:
    return [
        ce.Tier(memory, interval=ce.Every(steps=1)),
        ce.Tier(tmp_path / "disk", interval=ce.Every(steps=2), keep=ce.Keep(last=2)),
    ]


@pytest.fixture
def left(tmp_path: Path, memory: str) -> Path:
    """The root of a job that lost it after step 1, and then died: step 7 in memory, 4 and 6 on the disk."""
    root, state = tmp_path / "root", state_of(0)
    job = ce.Checkpointer(state, root, tiers=places(tmp_path, memory), interval=ce.Every(steps=100), random=False)
    run_steps(job, state, range(1, 2))
    job.save(1).result(WITHIN_S)
    root.rename(tmp_path / "away")
    root.write_bytes(b"")
    run_steps(job, state, range(2, 8))
    assert job.wait(timeout_s=WITHIN_S)
    job.close()
    root.unlink()
    (tmp_path / "away").rename(root)
    assert (ce.steps(folder_of(memory)), ce.steps(tmp_path / "disk"), ce.steps(root)) == ([7], [4, 6], [1])
    return root


@pytest.mark.parametrize("newest", [7, 6])
def test_the_newest_reaches_the_root(tmp_path: Path, memory: str, left: Path, newest: int) -> None:
    if newest == 6:  # the node was started anew
        shutil.rmtree(folder_of(memory))
    state = state_of(0)
    with ce.Checkpointer(state, left, tiers=places(tmp_path, memory), random=False) as job:
        assert job.restore() == newest
    assert ce.steps(left) == [1, newest]
    assert ce.load(state, left) == newest
    assert is_exactly(state, newest)


def commit_of(step: Step) -> CommitRef:
    return CommitRef(step.step, step.manifest.attempt, step.manifest.save)


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (3, 2)])
def test_a_job_of_another_size_carries_every_file(tmp_path: Path, before: int, now: int) -> None:
    shared: dict[str, bytes] = {}
    settings = DrainSettings(part_bytes=1 << 20, rank_timeout_s=WITHIN_S)
    ports = [Threads(rank, now, shared) for rank in range(now)] if now > 1 else [Alone()]
    made = write_step(tmp_path / "disk", 5, world=before)
    levels = [Levels(tmp_path / "root", [ce.Tier(tmp_path / "disk")], port=port, settings=settings) for port in ports]
    found = []

    def resume(number: int) -> None:
        future = levels[number].resume(commit_of(made))
        assert future is not None
        found.append(future.result(WITHIN_S))

    ranks = [threading.Thread(target=resume, args=(number,)) for number in range(now)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [1] * now
    assert sorted(History(Root(tmp_path / "root")).line()) == [5]
    for name in made.names:
        assert (tmp_path / "root" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    for each in reversed(levels):
        assert each.close(10)


def test_what_the_root_has_is_not_carried_again(tmp_path: Path) -> None:
    state = state_of(3)
    ce.save(state, tmp_path / "root", 3, tiers=[ce.Tier(tmp_path / "disk")])
    made = Root(tmp_path / "root")
    (ref,) = made.history.commits()
    levels = Levels(tmp_path / "root", [ce.Tier(tmp_path / "disk")], port=Alone())
    assert levels.resume(ref) is None
    assert levels.close(10)


def test_a_damaged_copy_is_not_carried_on(tmp_path: Path, memory: str, left: Path) -> None:
    """The only copy of step 7 is damaged: the one before it is restored, and that is carried on."""
    flip(folder_of(memory), 7)
    state = state_of(0)
    with ce.Checkpointer(state, left, tiers=places(tmp_path, memory), random=False) as job:
        assert job.restore() == 6
        assert is_exactly(state, 6)
    assert ce.steps(left) == [1, 6]
