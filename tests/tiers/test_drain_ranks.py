"""Ranks that die or are slow, in each phase of a drain: the others hear of it in time, and nothing half-made counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ckptengine.errors import CheckpointError, CoordinationFailed
from ckptengine.operations.drain import Drain, DrainReport, DrainSettings
from ckptengine.store.history import History
from ckptengine.store.root import Root
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import IoLoop

from .contract import loop
from .steps import Step, Threads, write_step

__all__ = ["loop"]

WORLD = 3
WAIT_S = 0.6
SETTINGS = DrainSettings(part_bytes=1 << 18, rank_timeout_s=WAIT_S)
PATIENT = DrainSettings(part_bytes=1 << 18, rank_timeout_s=30.0)


class Mortal(Threads):
    """A rank that is gone from its first word about ``phase`` on: it says and hears nothing any more."""

    def __init__(self, rank: int, shared: dict[str, bytes], phase: str) -> None:
        super().__init__(rank, WORLD, shared)
        self._phase, self.dead = phase, False

    def put(self, key: str, data: bytes) -> None:
        self._live(key)
        super().put(key, data)

    def get(self, key: str, timeout_s: float) -> bytes:
        self._live(key)
        return super().get(key, timeout_s)

    def _live(self, key: str) -> None:
        self.dead = self.dead or f"/{self._phase}/" in key
        if self.dead:
            raise CoordinationFailed("this rank is dead")


class Slow(Threads):
    """A rank that takes its time before each word about ``phase``."""

    def __init__(self, rank: int, shared: dict[str, bytes], phase: str) -> None:
        super().__init__(rank, WORLD, shared)
        self._phase = phase

    def put(self, key: str, data: bytes) -> None:
        if f"/{self._phase}/" in key:
            time.sleep(0.3)
        super().put(key, data)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return write_step(tmp_path / "source", 100, world=WORLD, extents=(300_000, 5))


@pytest.fixture
def tiers(tmp_path: Path, step: Step) -> tuple[LocalTier, LocalTier]:
    return LocalTier(tmp_path / "source"), LocalTier(tmp_path / "target", create=True)


def carry(
    loop: IoLoop, tiers: tuple[LocalTier, LocalTier], ports: list[Threads], step: Step, settings: DrainSettings
) -> list[DrainReport | BaseException | None]:
    drains = [Drain(*tiers, loop, port=port, settings=settings) for port in ports]
    futures = [
        drain.submit(100, [step.drain_file(rank)], step.named if rank == 0 else None)
        for rank, drain in enumerate(drains)
    ]
    outcomes = [future.exception(60) or future.result() for future in futures]
    for drain in drains:
        assert drain.close(20), "nobody hangs"
    return outcomes


@pytest.mark.parametrize("dying", [0, 1, 2])
@pytest.mark.parametrize("phase", ["arrived", "published"])
def test_a_rank_dies(
    loop: IoLoop, tiers: tuple[LocalTier, LocalTier], step: Step, tmp_path: Path, dying: int, phase: str
) -> None:
    shared: dict[str, bytes] = {}
    ports = [Mortal(r, shared, phase) if r == dying else Threads(r, WORLD, shared) for r in range(WORLD)]
    began_s = time.monotonic()
    outcomes = carry(loop, tiers, ports, step, SETTINGS)
    assert time.monotonic() - began_s < 60
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes), outcomes
    if dying != 0:
        assert f"rank {dying}" in str(outcomes[0]), "the one that is gone is named"
    committed = sorted(History(Root(tmp_path / "target")).line())
    assert committed == ([] if phase == "arrived" else [100]), "a manifest only when every rank's part has arrived"

    again = carry(loop, tiers, _all(), step, PATIENT)
    assert all(isinstance(outcome, DrainReport) for outcome in again), "the next job carries it on"
    assert sum(one.sent_bytes for one in again if isinstance(one, DrainReport)) == 0, "and sends nothing twice"
    assert sorted(History(Root(tmp_path / "target")).line()) == [100]


def _all() -> list[Threads]:
    shared: dict[str, bytes] = {}
    return [Threads(rank, WORLD, shared) for rank in range(WORLD)]


@pytest.mark.parametrize("slow", [0, 2])
@pytest.mark.parametrize("phase", ["arrived", "published"])
def test_a_slow_rank_is_waited_for(
    loop: IoLoop, tiers: tuple[LocalTier, LocalTier], step: Step, tmp_path: Path, slow: int, phase: str
) -> None:
    shared: dict[str, bytes] = {}
    ports = [Slow(r, shared, phase) if r == slow else Threads(r, WORLD, shared) for r in range(WORLD)]
    outcomes = carry(loop, tiers, ports, step, PATIENT)
    assert all(isinstance(outcome, DrainReport) for outcome in outcomes), outcomes
    assert sorted(History(Root(tmp_path / "target")).line()) == [100]
