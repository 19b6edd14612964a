"""The places behind the first tier, held while a job writes there: directories by a lock, the root by a lease."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import SaveFailed, Superseded
from ckptengine.operations.levels.level import Level
from ckptengine.store import names
from ckptengine.store.lock import RootLock
from ckptengine.tiers.lease import Lease
from ckptengine.tiers.local import LocalTier


class Held:
    """What one job holds.  A place whose lease is lost is not written to any more: see `check`."""

    def __init__(self) -> None:
        self._locks: list[RootLock] = []
        self._leases: dict[str, Lease] = {}

    def take(self, levels: Sequence[Level]) -> None:
        """Take every place of ``levels``, the root last.  Raises `RootInUse` where another live job holds one."""
        for level in levels:
            if isinstance(level.tier, LocalTier):
                self._locks.append(RootLock(level.tier.root / names.LOCK))
            elif level is levels[-1]:
                self._leases[level.spec.label] = Lease(level.flat)

    def check(self, level: Level) -> None:
        """Before anything is committed or removed on ``level``: raise where the right to do so may be gone.

        `Superseded` where another job has taken the place, which is final; `SaveFailed` where the lease could not be
        renewed in time, which may pass.
        """
        lease = self._leases.get(level.spec.label)
        if lease is None or not lease.lost:
            return
        if lease.taken:
            raise Superseded(
                f"the lease of {level.spec.label} was taken over by another job while this one slept; this job commits "
                f"and removes nothing there any more: stop one of the two"
            )
        raise SaveFailed(
            f"the lease of {level.spec.label} could not be renewed in time, so another job may hold it now; nothing is "
            f"committed or removed there until it is renewed: look whether the place can be reached"
        )

    def release(self) -> None:
        """Let everything go; safe to call twice."""
        for lock in self._locks:
            lock.release()
        for lease in self._leases.values():
            lease.release()
