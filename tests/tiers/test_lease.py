"""The lease of a remote root: one living holder, dead ones taken over in time, no clock compared."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from ckptengine.errors import RootInUse, StorageFailed
from ckptengine.tiers.lease import Lease, LeaseTimes
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.port import Bytes, Entry

from .contract import loop

__all__ = ["loop"]

QUICK = LeaseTimes(renew_s=0.05, expiry_s=1.0, poll_s=0.05)
SLOW = LeaseTimes(renew_s=3600, expiry_s=0.3, poll_s=0.05)


@pytest.fixture
def tier(tmp_path: Path, loop: IoLoop) -> BlockingTier:
    return BlockingTier(LocalTier(tmp_path), loop)


def test_a_free_root_is_taken_at_once(tier: BlockingTier) -> None:
    started_s = time.monotonic()
    lease = Lease(tier, QUICK)
    assert time.monotonic() - started_s < QUICK.expiry_s
    assert len(tier.entries("lease/")) == 1
    lease.release()
    lease.release()
    assert tier.entries() == []


def test_a_living_holder_is_respected(tier: BlockingTier) -> None:
    first = Lease(tier, QUICK)
    with pytest.raises(RootInUse, match="host"):
        Lease(tier, QUICK)
    time.sleep(2 * QUICK.expiry_s)
    assert not first.lost
    with pytest.raises(RootInUse):
        Lease(tier, QUICK)
    assert not first.lost, "a job that was refused takes nothing with it"
    first.release()
    second = Lease(tier, QUICK)
    second.release()


def test_a_dead_holder_is_taken_over_in_the_stated_time(tier: BlockingTier) -> None:
    dead = Lease(tier, SLOW)  # it never renews: as good as dead
    started_s = time.monotonic()
    heir = Lease(tier, QUICK)
    assert QUICK.expiry_s <= time.monotonic() - started_s < QUICK.expiry_s + 10
    assert dead.lost, "by its own clock, without being told"
    assert not heir.lost
    assert len(tier.entries("lease/")) == 1
    heir.release()
    dead.release()


def test_a_job_that_slept_notices_that_its_lease_is_gone(tier: BlockingTier) -> None:
    lease = Lease(tier, QUICK)
    for entry in tier.entries("lease/"):
        tier.delete(entry.name)
    deadline_s = time.monotonic() + 5
    while not lease.lost and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert lease.lost
    assert lease.taken
    time.sleep(3 * QUICK.renew_s)
    assert tier.entries("lease/") == [], "and claims nothing any more"
    lease.release()


def test_never_do_two_that_start_together_both_stay(tier: BlockingTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "_wait_for_the_dead", lambda self: None)
    leases, refused = [], 0
    for _ in range(4):
        try:
            leases.append(Lease(tier, QUICK))
        except RootInUse:
            refused += 1
    holders = {entry.name.partition("-")[0] for entry in tier.entries("lease/")}
    assert len(holders) == len(leases) == 1
    assert refused == 3
    for lease in leases:
        lease.release()


def test_trouble_with_renewing_is_not_the_end_at_once(tmp_path: Path, loop: IoLoop) -> None:
    class Failing(LocalTier):
        down = False

        async def create(self, name: str, data: Bytes) -> None:
            if self.down:
                raise StorageFailed("cannot write: down")
            await super().create(name, data)

    place = Failing(tmp_path)
    lease = Lease(BlockingTier(place, loop), QUICK)
    place.down = True
    time.sleep(0.2)
    assert not lease.lost
    time.sleep(QUICK.expiry_s)
    assert lease.lost
    place.down = False
    deadline_s = time.monotonic() + 5
    while lease.lost and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not lease.lost, "renewed as soon as that could be done"
    assert not lease.taken
    lease.release()
    assert lease._tier.entries() == []


class Slow(LocalTier):
    """A place whose answers to creating wait until they are let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.go.set()

    async def create(self, name: str, data: Bytes) -> None:
        await super().create(name, data)
        while not self.go.is_set():
            await asyncio.sleep(0.01)


def test_a_lease_that_went_while_it_was_renewed_is_not_held_on(tmp_path: Path, loop: IoLoop) -> None:
    """The renewal arrived, its answer did not; meanwhile somebody took the place over, and removed what was there."""
    place = Slow(tmp_path)
    slow = Lease(BlockingTier(place, loop), QUICK)
    tier = BlockingTier(LocalTier(tmp_path), loop)
    place.go.clear()
    while len(tier.entries("lease/")) < 2:
        time.sleep(0.01)
    heir = Lease(tier, LeaseTimes(renew_s=0.05, expiry_s=0.3, poll_s=0.05))
    place.go.set()
    deadline_s = time.monotonic() + 5
    while not slow.taken and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert slow.taken
    assert not heir.lost
    slow.release()
    assert len(tier.entries("lease/")) == 1, "only the heir's"
    heir.release()


def test_giving_back_is_bounded_where_storage_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ckptengine.tiers.lease.RELEASE_S", 0.5)
    place, loop = Slow(tmp_path), IoLoop()
    lease = Lease(BlockingTier(place, loop), QUICK)
    place.go.clear()

    async def hang(prefix: str = "") -> list[Entry]:
        await asyncio.sleep(3600)
        return []

    monkeypatch.setattr(place, "entries", hang)
    began_s = time.monotonic()
    lease.release()
    assert time.monotonic() - began_s < 5
    assert "will expire" in caplog.text
    loop.close()
    lease._thread.join(10)
    assert not lease._thread.is_alive()
