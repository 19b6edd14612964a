"""Retention on a tier: what goes, what never does, interruptions, abandoned lines, leftovers of dead saves."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptengine.errors import CheckpointError, StorageFailed
from ckptengine.operations.retain import Known, apply_retention, plan_retention
from ckptengine.policy.keep import Keep
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import History
from ckptengine.store.root import Root
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop

from .contract import loop
from .steps import write_step

__all__ = ["loop"]


@pytest.fixture
def tier(tmp_path: Path, loop: IoLoop) -> BlockingTier:
    return BlockingTier(LocalTier(tmp_path), loop)


def steps_on(tier: BlockingTier) -> list[int]:
    return sorted(History(TierFiles(tier)).line())


def retain(tier: BlockingTier, keep: Keep, **kwargs: object) -> list[int]:
    apply_retention(tier, plan_retention(tier, keep, **kwargs))  # type: ignore[arg-type]
    return steps_on(tier)


def make(tmp_path: Path, *steps: int, **kwargs: object) -> None:
    for step in steps:
        write_step(tmp_path, step, extents=(100,), **kwargs)  # type: ignore[arg-type]


def test_keeps_the_last(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30, 40, world=2)
    plan = plan_retention(tier, Keep(last=2))
    assert plan.kept == (30, 40)
    assert [removal.ref.step for removal in plan.removals] == [10, 20]
    objects = [entry.name.partition("/")[2] for entry in plan.removals[0].objects]
    assert [name.partition("-")[0] for name in objects] == ["manifest", "rank", "rank"]
    assert steps_on(tier) == [10, 20, 30, 40], "planning changes nothing"
    freed = apply_retention(tier, plan)
    assert freed == plan.size_bytes > 0
    assert steps_on(tier) == [30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000030", "step-000000040"]


def test_what_it_does_not_recognise_stays(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    (tmp_path / "step-000000010" / "notes.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rank-00000-a000001-n0001.bin").write_text("mine")
    assert retain(tier, Keep(last=1)) == [20]
    assert [path.name for path in (tmp_path / "step-000000010").iterdir()] == ["notes.txt"]
    assert (tmp_path / "data" / "rank-00000-a000001-n0001.bin").read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_a_damaged_newest_one_protects_the_one_before(tier: BlockingTier, tmp_path: Path, damage: str) -> None:
    make(tmp_path, 10, 20, 30)
    folder = tmp_path / "step-000000030"
    rank = folder / names.rank_file(0, 1, 1)
    if damage == "missing":
        rank.unlink()
    elif damage == "short":
        rank.write_bytes(rank.read_bytes()[:-1])
    else:
        manifest = folder / names.manifest(1, 1)
        manifest.write_bytes(manifest.read_bytes().replace(b"2000", b"2001"))
    plan = plan_retention(tier, Keep(last=1))
    assert plan.anchor is not None
    assert plan.anchor.step == 20
    assert retain(tier, Keep(last=1)) == [20, 30]


def test_only_a_verified_step_lets_older_ones_go(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    assert retain(tier, Keep(last=1), verified=[]) == [10, 20, 30]
    assert retain(tier, Keep(last=1), verified=[20]) == [20, 30]


def test_steps_that_a_drain_reads_stay(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    assert retain(tier, Keep(last=1), protected=[10]) == [10, 30]


def test_nothing_good_nothing_removed(tier: BlockingTier, tmp_path: Path) -> None:
    assert plan_retention(tier, Keep(last=1)).removals == ()
    make(tmp_path, 10, 20)
    for path in tmp_path.glob("step-*/rank-*"):
        path.unlink()
    assert retain(tier, Keep(last=1)) == [10, 20]


def test_best_and_spaced_by_metrics_and_time(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    for step, loss, created in ((10, 0.5, "2020-01-01T00:00:00+00:00"), (20, 0.1, "not a time"), (30, 0.9, "2020")):
        folder = tmp_path / names.step_dir(step)
        path = folder / names.manifest(1, 1)
        old = manifests.decode(path.read_bytes(), "")
        path.write_bytes(replace(old, metrics={"loss": loss}, created=created).encode())
    assert retain(tier, Keep(best=("loss", "min"), seconds=60)) == [10, 20, 30]
    assert retain(tier, Keep(best=("loss", "min"))) == [20, 30]


def test_abandoned_lines_and_dead_saves_go(tier: BlockingTier, tmp_path: Path) -> None:
    root = Root(tmp_path)
    assert root.claim("r").number == 1
    make(tmp_path, 10, 20, 30)
    dead = tmp_path / "step-000000040"
    dead.mkdir()
    (dead / names.rank_file(0, 1, 9)).write_bytes(b"died before its manifest")
    assert root.claim("r", upto=20).number == 2
    assert steps_on(tier) == [10, 20]
    plan = plan_retention(tier, Keep())
    assert {(removal.ref.step, removal.why.split(",")[0]) for removal in plan.removals} == {
        (30, "part of an abandoned line of history"),
        (40, "never committed"),
    }
    apply_retention(tier, plan)
    assert steps_on(tier) == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "step-000000010", "step-000000020"]


def test_a_save_in_flight_is_not_touched(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    flight = tmp_path / "step-000000030"
    flight.mkdir()
    (flight / names.rank_file(0, 1, 2)).write_bytes(b"half")
    again = tmp_path / "step-000000010" / names.rank_file(0, 1, 3)
    again.write_bytes(b"the same step once more")
    retain(tier, Keep(last=1))
    assert (flight / names.rank_file(0, 1, 2)).exists()
    assert again.exists()


def test_a_failed_save_older_than_the_newest_good_one_goes(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10)
    wreck = tmp_path / "step-000000005"
    wreck.mkdir()
    (wreck / names.rank_file(0, 1, 0)).write_bytes(b"failed")
    assert retain(tier, Keep()) == [10]
    assert not wreck.exists()


def test_stops_when_the_newest_good_one_vanishes(tier: BlockingTier, tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30)
    plan = plan_retention(tier, Keep(last=1))
    for path in (tmp_path / "step-000000030").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="gone"):
        apply_retention(tier, plan)
    assert steps_on(tier) == [10, 20]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 12), last=st.integers(1, 3))
def test_interrupted_anywhere_the_rest_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, loop: IoLoop, stop: int, last: int
) -> None:
    path = tmp_path_factory.mktemp("retain")
    for step in (10, 20, 30, 40):
        write_step(path, step, extents=(100,), world=2, save=step)
        (path / names.step_dir(step) / f".drain-00000000-{names.rank_file(0, 1, step)}.log").write_bytes(b"noted")

    class Dying(LocalTier):
        left = stop

        async def delete(self, name: str) -> None:
            if self.left == 0:
                raise StorageFailed("killed")
            self.left -= 1
            await super().delete(name)

    dying = BlockingTier(Dying(path), loop)
    with contextlib.suppress(StorageFailed):
        apply_retention(dying, plan_retention(dying, Keep(last=last)))
    tier = BlockingTier(LocalTier(path), loop)
    assert max(steps_on(tier)) == 40
    for step in steps_on(tier):
        assert step in plan_retention(tier, Keep()).kept, "a step that has a manifest is whole"
    retain(tier, Keep(last=last))
    assert sorted(found.name for found in path.iterdir()) == [names.step_dir(n) for n in (10, 20, 30, 40)[-last:]]
    assert not list(path.glob("*/.*")), "nothing hidden is left"


def test_a_manifest_that_was_seen_is_not_parsed_again_unless_its_bytes_changed(
    tier: BlockingTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 1, 2, 3)
    known, parsed, decode = Known(), list[str](), manifests.decode

    def counted(data: bytes, where: str) -> manifests.Manifest:
        parsed.append(where)
        return decode(data, where)

    monkeypatch.setattr(manifests, "decode", counted)
    assert plan_retention(tier, Keep(last=2), known=known).kept == (2, 3)
    assert len(parsed) == 3
    assert retain(tier, Keep(last=2), known=known) == [2, 3]
    assert len(parsed) == 3
    make(tmp_path, 4)
    (newest,) = (tmp_path / "step-000000004").glob("manifest-*")
    assert plan_retention(tier, Keep(last=2), known=known).kept == (3, 4)
    assert len(parsed) == 4
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    plan = plan_retention(tier, Keep(last=1), known=known)
    assert plan.anchor is not None
    assert plan.anchor.step == 3, "what is damaged now is not relied on, though it was good before"
