"""Restoring across tiers: each byte from the nearest tier that has it intact, what was used and what was wrong told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ckptengine.errors import CheckpointError, Damaged, StorageFailed
from ckptengine.operations.levels.tiered import TieredFiles, TieredReader, open_tiered
from ckptengine.sources.port import Files
from ckptengine.store import names
from ckptengine.store.history import CommitRef, History
from ckptengine.store.root import Root
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop

from .contract import loop
from .steps import Step, write_step

__all__ = ["loop"]

EXTENTS = (100_000, 3, 70_000)
REF = CommitRef(100, 1, 1)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    step = write_step(tmp_path / "far", 100, world=2, extents=EXTENTS)
    shutil.copytree(tmp_path / "far", tmp_path / "near")
    return step


@pytest.fixture
def tiers(tmp_path: Path, step: Step, loop: IoLoop) -> list[Files]:
    return [TierFiles(BlockingTier(LocalTier(tmp_path / name), loop)) for name in ("near", "far")]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read_all(reader: TieredReader) -> None:
    """Every extent of every rank, compared with what was written."""
    for rank in range(2):
        index = reader.tail(rank).index
        for tensor, record in enumerate(index):
            view = bytearray(int(record["nbytes"]))
            reader.read_verified(reader.path(rank), int(record["offset"]), memoryview(view))
            expected = np.random.default_rng([100, rank, tensor]).integers(0, 256, len(view), np.uint8)
            assert view == expected.tobytes()


def test_everything_from_the_nearest(tiers: list[Files]) -> None:
    reader = open_tiered(tiers, REF).reader
    assert isinstance(reader, TieredReader)
    reader.check_sizes()
    read_all(reader)
    assert dict(reader.used_bytes) == {tiers[0].root: 2 * sum(EXTENTS)}
    assert reader.troubles == {}


def test_a_rank_that_is_missing_near_by_comes_from_afar(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    (tmp_path / "near" / step.names[1]).unlink()
    reader = open_tiered(tiers, REF).reader
    assert isinstance(reader, TieredReader)
    reader.check_sizes()
    read_all(reader)
    assert dict(reader.used_bytes) == {tiers[0].root: sum(EXTENTS), tiers[1].root: sum(EXTENTS)}
    assert list(reader.troubles) == [(tiers[0].root, 1)]


@pytest.mark.parametrize("at", [0, 5000, 150_000, -1, -60])
def test_a_damaged_byte_near_by_is_taken_from_afar(tiers: list[Files], tmp_path: Path, step: Step, at: int) -> None:
    flip(tmp_path / "near" / step.names[0], at)
    reader = open_tiered(tiers, REF).reader
    assert isinstance(reader, TieredReader)
    read_all(reader)
    assert reader.used_bytes[tiers[0].root] >= sum(EXTENTS), "what is intact near by is still used"
    assert list(reader.troubles) == [(tiers[0].root, 0)]


def test_different_damage_on_each_tier_is_no_damage(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    flip(tmp_path / "near" / step.names[0], 5000)
    flip(tmp_path / "far" / step.names[0], 150_000)
    (tmp_path / "far" / step.names[1]).unlink()
    reader = open_tiered(tiers, REF).reader
    assert isinstance(reader, TieredReader)
    read_all(reader)


def test_the_same_damage_everywhere_is_found(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    for tier in ("near", "far"):
        flip(tmp_path / tier / step.names[0], 5000)
    reader = open_tiered(tiers, REF).reader
    assert isinstance(reader, TieredReader)
    with pytest.raises(Damaged):
        read_all(reader)


def test_missing_everywhere(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    for tier in ("near", "far"):
        (tmp_path / tier / step.names[0]).unlink()
    with pytest.raises(CheckpointError, match="rank-00000"):
        open_tiered(tiers, REF).reader.check_sizes()


def test_the_manifest_too(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    flip(tmp_path / "near" / step.named.name, 300)
    source = open_tiered(tiers, REF)
    assert source.manifest == step.manifest
    flip(tmp_path / "far" / step.named.name, 300)
    with pytest.raises(CheckpointError, match="manifest"):
        open_tiered(tiers, REF)


def test_newest_is_the_newest_anywhere(tiers: list[Files], tmp_path: Path) -> None:
    write_step(tmp_path / "near", 200, save=2)
    write_step(tmp_path / "far", 50, save=1)
    assert sorted(History(TieredFiles(tiers)).line()) == [50, 100, 200]


def test_an_abandoned_line_on_a_tier_that_missed_the_news(tiers: list[Files], tmp_path: Path) -> None:
    """A node that was away holds steps of the old line, and no record of the attempt that left them behind."""
    Root(tmp_path / "far").claim("r")
    Root(tmp_path / "near").claim("r")
    write_step(tmp_path / "near", 200, save=2)
    Root(tmp_path / "far").claim("r", upto=100)
    assert sorted(History(tiers[0]).line()) == [100, 200]
    assert sorted(History(TieredFiles(tiers)).line()) == [100]


class Dead:
    """A tier whose every answer is an error."""

    root = "dead"

    def __getattr__(self, name: str) -> object:
        def fail(*args: object, **kwargs: object) -> None:
            raise StorageFailed("cannot read dead: the mount is gone")

        return fail


def test_a_tier_that_is_down_does_not_matter(tiers: list[Files], step: Step) -> None:
    dead: Files = Dead()  # type: ignore[assignment]
    files = TieredFiles([dead, tiers[1]])
    assert sorted(History(files).line()) == [100]
    assert files.exists(step.named.name)
    assert not files.exists("nothing")
    assert "dead" in files.troubles
    reader = open_tiered([dead, tiers[1]], REF).reader
    assert isinstance(reader, TieredReader)
    read_all(reader)
    with pytest.raises(StorageFailed):
        open_tiered([dead], REF)


def test_files_of_a_tier(tiers: list[Files], tmp_path: Path, step: Step) -> None:
    files = tiers[0]
    assert files.entries() == ["step-000000100/"]
    assert files.entries("step-000000100") == sorted(name.partition("/")[2] for name in (*step.names, step.named.name))
    assert files.exists("step-000000100")
    below = files.sub("step-000000100")
    assert below.entries() == files.entries("step-000000100")
    assert below.local_path(names.rank_file(0, 1, 1)) == str(tmp_path / "near" / step.names[0])
    assert files.local_path("") == str(tmp_path / "near")
    view = bytearray(4)
    below.read_into(names.rank_file(0, 1, 1), 0, memoryview(view))
    assert view == files.read(step.names[0], 0, 4)
