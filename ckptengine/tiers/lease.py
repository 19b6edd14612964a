"""The live lock of a root that no operating system can lock: a lease that its holder renews.

The lease is a small object; renewing replaces it by the next one of a running number.  Nobody's clock is compared with
anybody else's: who finds a lease watches, by its own monotonic clock, whether it is renewed.  A lease that stays the
same for `LeaseTimes.expiry_s` is dead and is taken over.  It keeps two live jobs apart; what makes sure that nothing
is mixed even when it fails (a job that slept, two that start together) is the claiming of attempts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from ckptengine.errors import AlreadyExists, CheckpointError, RootInUse
from ckptengine.tiers.loop import BlockingTier

log = logging.getLogger("ckptengine")

FOLDER = "lease"
_TRIES = 3
RELEASE_S = 5.0
"""How long giving back may take: storage that hangs must not hold up the end of a job."""
_NAME = re.compile(r"lease/(?P<holder>[0-9a-f]{16})-(?P<number>\d{12})\.json")


def is_lease(name: str) -> bool:
    """Whether the object ``name`` is part of a lease."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """``renew_s``: how often the holder renews; ``expiry_s``: how long a lease may stay unchanged before it is dead."""

    renew_s: float = 10.0
    expiry_s: float = 45.0
    poll_s: float = 2.0


class Lease:
    """Exclusive right to write beneath a remote root, from construction to `release`.

    Construction waits up to ``expiry_s`` where it finds a lease, to see whether its holder lives.  Raises `RootInUse`
    where it does.  Renewal runs on a thread of its own; `lost` says that it has failed for so long, or met such a
    thing, that others may have taken over.
    """

    def __init__(self, tier: BlockingTier, times: LeaseTimes | None = None) -> None:
        self._tier = tier
        self._times = times or LeaseTimes()
        self._holder = secrets.token_hex(8)
        self._number = 0
        self._renewed_s = 0.0
        self._taken = False
        self._stop = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._renew, name="ckptengine-lease", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether the right may have gone to somebody else."""
        return self._taken or time.monotonic() - self._renewed_s > self._times.expiry_s

    @property
    def taken(self) -> bool:
        """Whether the lease was found to be gone: this holder is not to come back."""
        return self._taken

    def release(self) -> None:
        """Give the root up, in a bounded time; safe to call twice.  A lease that cannot be removed expires."""
        if self._stop.is_set():
            return
        self._stop.set()
        deadline_s = time.monotonic() + RELEASE_S
        self._thread.join(RELEASE_S / 2)  # it may be in the middle of a renewal
        try:
            for name in self._leases(deadline_s):  # one that replaced another may be there beside it
                if _holder(name) == self._holder:
                    self._until(deadline_s).delete(name)
        except CheckpointError as failure:
            log.warning("the lease of %s could not be given back and will expire: %s", self._tier.label, failure)

    def _until(self, deadline_s: float | None) -> BlockingTier:
        return self._tier if deadline_s is None else self._tier.within(max(0.1, deadline_s - time.monotonic()))

    def _wait_for_the_dead(self) -> None:
        """Return once no living job holds a lease; what dead ones left is removed."""
        first = set(self._leases())
        deadline_s = time.monotonic() + self._times.expiry_s
        while first:
            if time.monotonic() >= deadline_s:
                for name in first:
                    self._tier.delete(name)
                return
            time.sleep(min(self._times.poll_s, max(0.0, deadline_s - time.monotonic())))
            found = set(self._leases())
            if found - first:
                raise self._in_use(sorted(found - first)[0])
            first = found

    def _acquire(self) -> None:
        """Put a lease, and withdraw it where somebody else's has come up meanwhile: never do two stay."""
        for _ in range(_TRIES):
            self._wait_for_the_dead()
            self._put()
            rivals = [name for name in self._leases() if _holder(name) != self._holder]
            if not rivals:
                return
            self._tier.delete(self._name(self._number))
            time.sleep(random.uniform(0, self._times.poll_s))
        raise self._in_use(rivals[0])

    def _renew(self) -> None:
        while not self._stop.wait(self._times.renew_s):
            try:
                old = self._name(self._number)
                if self._tier.stat(old) is not None:
                    self._put()
                    if self._tier.stat(old) is not None:
                        self._tier.delete(old)
                        continue
                    # It went while the new one was on its way, which may take long: whoever removed it holds the place.
                    self._tier.delete(self._name(self._number))
                # Nothing is put any more: it would look as if this job still held what it has lost.
                self._taken = True
                log.error("the lease of %s was taken by another job while this one slept", self._tier.label)
                return
            except CheckpointError as failure:
                if not self._stop.is_set():
                    log.warning("the lease of %s could not be renewed: %s", self._tier.label, failure)

    def _put(self) -> None:
        began_s = time.monotonic()  # others count from when it arrives, which may be long before its answer does
        about = {"host": socket.gethostname(), "pid": os.getpid()}
        # It may be there: an earlier try that arrived although its answer did not.  The name is ours alone.
        with contextlib.suppress(AlreadyExists):
            self._tier.create(self._name(self._number + 1), json.dumps(about).encode())
        self._number += 1  # only now: a renewal that failed must not look like a lease that was taken
        self._renewed_s = began_s

    def _leases(self, deadline_s: float | None = None) -> list[str]:
        found = self._until(deadline_s).entries(f"{FOLDER}/")
        return [entry.name for entry in found if _NAME.fullmatch(entry.name)]

    def _name(self, number: int) -> str:
        return f"{FOLDER}/{self._holder}-{number:012d}.json"

    def _in_use(self, name: str) -> RootInUse:
        try:
            entry = self._tier.stat(name)
            about = self._tier.read(name, 0, entry.size_bytes).decode() if entry is not None else "unknown"
        except (CheckpointError, UnicodeDecodeError):
            about = "unknown"
        return RootInUse(f"{self._tier.label}: another live job holds it ({about}); stop that job or use another root")


def _holder(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["holder"] if match else ""
