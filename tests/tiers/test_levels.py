"""Several tiers in a row: how far each step goes, what each keeps, two jobs, lost landings, many ranks."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptengine.coordination.alone import Alone
from ckptengine.errors import CoordinationFailed, RootInUse, StorageFailed, Superseded, Truncated, UnusableRequest
from ckptengine.operations.drain import DrainSettings
from ckptengine.operations.levels.levels import Levels
from ckptengine.operations.levels.tiered import TieredReader, open_tiered
from ckptengine.policy.interval import Every, Soonest
from ckptengine.policy.keep import Keep
from ckptengine.store.history import CommitRef, History
from ckptengine.store.root import Root
from ckptengine.tiers.spec import Tier

from .steps import Threads, landed_of, write_step

SETTINGS = DrainSettings(part_bytes=1 << 20, rank_timeout_s=20)


class Job:
    """What a training job does with its levels: claim, write, land."""

    def __init__(self, root: object, tiers: list[Tier], **kwargs: object) -> None:
        self.levels = Levels(str(root), tiers, port=Alone(), settings=SETTINGS, **kwargs)  # type: ignore[arg-type]
        self.root = Root(self.levels.landing)
        self.root.history = self.levels.history()
        self.attempt = 0
        self.saves = 0

    def claim(self, upto: int | None = None) -> None:
        self.attempt = self.root.claim("run", upto=upto).number
        self.levels.announce(self.attempt)

    def save(self, step: int, *, all_the_way: bool = False) -> int:
        if not self.attempt:
            self.claim()
        self.saves += 1
        made = write_step(self.levels.landing, step, extents=(1000,), attempt=self.attempt, save=self.saves)
        return self.levels.landed(landed_of(made, all_the_way=all_the_way)).result(30)

    def close(self) -> None:
        assert self.levels.close(10)


def steps_at(path: Path) -> list[int]:
    return sorted(History(Root(path)).line())


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    tiers = [
        Tier(tmp_path / "fast", interval=Every(steps=1), keep=Keep(last=2)),
        Tier(tmp_path / "disk", interval=Every(steps=5), keep=Keep(last=3)),
    ]
    job = Job(tmp_path / "root", tiers, interval=Every(steps=10))
    yield job
    job.close()


def test_each_step_goes_as_far_as_it_is_wanted(job: Job, tmp_path: Path) -> None:
    assert [job.save(step) for step in range(1, 21)] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 2] * 2
    assert steps_at(tmp_path / "fast") == [19, 20]
    assert steps_at(tmp_path / "disk") == [10, 15, 20]
    assert steps_at(tmp_path / "root") == [10, 20]
    assert not list((tmp_path / "fast").glob("*/.*")), "no notes of the drain are left"


def test_an_explicit_save_goes_all_the_way(job: Job, tmp_path: Path) -> None:
    assert job.save(3, all_the_way=True) == job.levels.last == 2
    assert steps_at(tmp_path / "root") == [3]


def test_the_hook_follows_the_soonest(job: Job) -> None:
    interval = job.levels.interval()
    assert isinstance(interval, Soonest)
    assert interval.due(1, 0.0, None)
    assert [line.partition(": ")[2] for line in job.levels.describe()] == [
        "every 1 steps; keep the last 2",
        "every 5 steps; keep the last 3",
        "every 10 steps; keep everything",
    ]


def test_without_tiers_saves_land_on_the_root(tmp_path: Path) -> None:
    job = Job(tmp_path / "root", [], keep=Keep(last=1))
    assert job.levels.is_single
    assert job.levels.landing == tmp_path / "root"
    assert job.levels.interval() is None
    assert [job.save(1), job.save(2)] == [0, 0]
    assert steps_at(tmp_path / "root") == [2]
    job.close()


def test_an_empty_landing_goes_on_from_the_root(tmp_path: Path) -> None:
    """A node that was replaced: its own tier is empty, and nothing of the root may be forgotten or claimed again."""
    tiers = [Tier(tmp_path / "fast")]
    first = Job(tmp_path / "root", tiers)
    for step in (10, 20, 30):
        first.save(step)
    first.close()
    shutil.rmtree(tmp_path / "fast")
    second = Job(tmp_path / "root", tiers)
    assert sorted(second.levels.history().line()) == [10, 20, 30]
    source = open_tiered(second.levels.files(), CommitRef(30, 1, 3))
    assert isinstance(source.reader, TieredReader)
    source.reader.tail(0)
    second.save(40)
    assert second.attempt == 2
    assert steps_at(tmp_path / "root") == [10, 20, 30, 40]
    second.close()


def test_an_abandoned_line_is_abandoned_everywhere(tmp_path: Path) -> None:
    tiers = [Tier(tmp_path / "fast", keep=Keep(last=5))]
    first = Job(tmp_path / "root", tiers, keep=Keep(last=5))
    for step in (10, 20, 30):
        first.save(step)
    first.close()
    second = Job(tmp_path / "root", tiers, keep=Keep(last=5))
    second.claim(upto=20)
    assert steps_at(tmp_path / "root") == steps_at(tmp_path / "fast") == [10, 20]
    second.save(25)
    assert steps_at(tmp_path / "root") == steps_at(tmp_path / "fast") == [10, 20, 25]
    assert not (tmp_path / "root" / "step-000000030").exists(), "retention removed what was abandoned"
    second.close()


def test_two_jobs_on_one_root(tmp_path: Path) -> None:
    first = Job(tmp_path / "root", [Tier(tmp_path / "a")])
    with pytest.raises(RootInUse):
        Job(tmp_path / "root", [Tier(tmp_path / "b")])
    first.close()
    second = Job(tmp_path / "root", [Tier(tmp_path / "b")])
    second.save(1)
    second.close()


def test_of_two_that_claim_one_number_the_second_is_told(tmp_path: Path) -> None:
    job = Job(tmp_path / "root", [Tier(tmp_path / "a")])
    Root(tmp_path / "root").claim("another run")
    job.root.history = History(job.root)  # as if the root's list had come late
    with pytest.raises(Superseded, match="another job"):
        job.claim()
    job.close()


def test_a_failed_hop_leaves_the_step_where_it_is(tmp_path: Path, job: Job) -> None:
    job.save(10)
    shutil.rmtree(tmp_path / "root")
    with pytest.raises(StorageFailed, match="root"):
        job.save(20)
    assert steps_at(tmp_path / "disk") == [10, 20]
    (tmp_path / "root").mkdir()
    made = job.levels.landing / "step-000000020"
    assert made.exists(), "the step before it is durable at the root keeps its source"
    job.save(30)
    assert steps_at(tmp_path / "root") == [30]


def test_a_url_needs_a_landing_and_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("ckptengine.operations.levels.landing.SHARED_MEMORY", tmp_path / "none")
    url = f"memory://{uuid.uuid4().hex}/run"
    job = Job(url, [])
    assert job.levels.landing.is_relative_to(tmp_path)
    assert job.save(7) == 1
    assert sorted(History(job.levels.files()[1]).line()) == [7]
    landing = job.levels.landing
    job.close()
    assert not landing.exists(), "all was carried on"
    again = Job(url, [])
    assert sorted(again.levels.history().line()) == [7]
    again.close()
    with pytest.raises(UnusableRequest):
        Job(tmp_path / "root", [Tier("nosuchprotocol://x/y")])


def test_ranks_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node's first tier is its own: every rank carries its file from there, and each node has the manifest."""
    shared: dict[str, bytes] = {}
    levels = []
    made = write_step(tmp_path / "node-0", 10, world=2, extents=(1000,))
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        tiers = [Tier(tmp_path / f"node-{rank}")]
        levels.append(Levels(tmp_path / "root", tiers, port=Threads(rank, 2, shared), settings=SETTINGS))
    there = tmp_path / "node-1" / "step-000000010"
    there.mkdir(parents=True)
    (tmp_path / "node-0" / made.names[1]).rename(tmp_path / "node-1" / made.names[1])
    # The labels of the two nodes' tiers differ only because the nodes are emulated by two directories.
    for each in levels:
        drain = each._levels[1].drain
        assert drain is not None
        drain._name = "same"
    futures = [each.landed(landed_of(made, rank)) for rank, each in enumerate(levels)]
    assert [future.result(30) for future in futures] == [1, 1]
    assert steps_at(tmp_path / "root") == [10]
    assert sorted(path.name for path in there.iterdir()) == [made.manifest.file, made.names[1].partition("/")[2]]
    for rank, each in enumerate(levels):
        reader = open_tiered(each.files(), CommitRef(10, 1, 1)).reader
        assert isinstance(reader, TieredReader)
        for other in range(2):
            view = bytearray(1000)
            reader.read_verified(made.names[other], 4096, memoryview(view))
        assert reader.used_bytes == {f"{tmp_path}/node-{rank}": 1000, f"{tmp_path}/root": 1000}
    for each in reversed(levels):
        assert each.close(10)


def on_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, **kwargs: object) -> list[Levels]:
    """Two ranks, each on a node with a fast tier and a disk of its own."""
    shared: dict[str, bytes] = {}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    return [
        Levels(
            root,
            [Tier(tmp_path / f"fast-{rank}"), Tier(tmp_path / f"disk-{rank}", keep=Keep(last=2))],
            port=Threads(rank, 2, shared),
            settings=SETTINGS,
            **kwargs,  # type: ignore[arg-type]
        )
        for rank in range(2)
    ]


def test_every_node_s_own_tiers_keep_what_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = on_nodes(tmp_path, monkeypatch, tmp_path / "root", keep=Keep(last=2))
    for number in range(1, 6):
        made = write_step(tmp_path / "fast-0", number, world=2, save=number, extents=(1000,))
        (tmp_path / "fast-1" / f"step-{number:09d}").mkdir(parents=True)
        (tmp_path / "fast-0" / made.names[1]).rename(tmp_path / "fast-1" / made.names[1])
        futures = [each.landed(landed_of(made, rank)) for rank, each in enumerate(levels)]
        assert [future.result(30) for future in futures] == [2, 2]
    for each in reversed(levels):
        assert each.close(10)
    assert steps_at(tmp_path / "root") == [4, 5]
    for rank in range(2):
        for tier, steps in ((f"fast-{rank}", [5]), (f"disk-{rank}", [4, 5])):
            assert steps_at(tmp_path / tier) == steps, "each node has manifests of its own, and no more than it keeps"
            files = [path.name for path in (tmp_path / tier).glob("step-*/*")]
            assert len(files) == 2 * len(steps)
            assert all(name.startswith((f"rank-{rank:05d}", "manifest-")) for name in files)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_file_that_is_bad_on_one_rank_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    levels = on_nodes(tmp_path, monkeypatch, tmp_path / "root")
    futures = []
    for number in (1, 2):
        made = write_step(tmp_path / "fast-0", number, world=2, save=number, extents=(1000,))
        (tmp_path / "fast-1" / f"step-{number:09d}").mkdir(parents=True)
        (tmp_path / "fast-0" / made.names[1]).rename(tmp_path / "fast-1" / made.names[1])
        if number == 1:
            bad = tmp_path / f"fast-{failing}" / made.names[failing]
            bad.write_bytes(bad.read_bytes()[:-1])
        futures.append([each.landed(landed_of(made, rank)) for rank, each in enumerate(levels)])
    began_s = time.monotonic()
    assert isinstance(futures[0][failing].exception(30), Truncated)
    assert isinstance(futures[0][1 - failing].exception(30), CoordinationFailed)
    assert [future.result(30) for future in futures[1]] == [2, 2]
    assert time.monotonic() - began_s < SETTINGS.rank_timeout_s / 2, "nobody waited for the one that failed"
    for each in reversed(levels):
        assert each.close(10)
    assert steps_at(tmp_path / "root") == [2]
