"""Saves on their way: what each one needs, and who waits for it to get on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.optim.optimizer import Optimizer

from ckptengine.errors import CheckpointError, SaveFailed, UnusableRequest
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.operations.saving.rank_writer import RankWriter
from ckptengine.operations.saving.structure import Structure
from ckptengine.snapshot.capture import Capture
from ckptengine.snapshot.fence import under_way_elsewhere
from ckptengine.snapshot.register import Registered
from ckptengine.snapshot.waiting import Waiting
from ckptengine.state.leaves import FlatState
from ckptengine.store.manifest import FileRecord, Manifest


@dataclass(slots=True, kw_only=True, eq=False)
class SaveJob:
    """One save on its way through the threads."""

    step: int
    number: int
    flat: FlatState
    registered: Registered
    metrics: Mapping[str, float]
    handle: SaveHandle
    all_the_way: bool = False
    """It goes to the last tier whatever the tiers' intervals say."""
    ready: bool = False
    """Its capture is there, or never will be."""
    capture: Capture | None = None
    updates: list[Optimizer] = field(default_factory=list)
    """Optimizers whose update ended before the capture was there, during the registration or after it."""
    held: list[tuple[int, int]] = field(default_factory=list)
    writer: RankWriter | None = None
    structure: Structure | None = None
    run: str = ""
    attempt: int = 0
    record: FileRecord | None = None
    manifest: Manifest | None = None
    cancelled: CheckpointError | None = None
    superseded: bool = False
    unsettled: bool = False
    """Somebody may publish a manifest that names this rank's file, or has: the file must stay."""

    def check(self) -> None:
        """Raise where nobody wants the save any more: from then on no fence waits for it."""
        if self.cancelled is not None:
            raise self.cancelled
        if self.handle.done():
            raise SaveFailed(f"the call that was to save step {self.step} was interrupted")

    def updated(self, optimizer: Optimizer) -> None:
        """An update has happened, on the training thread."""
        self.updates.append(optimizer)  # first, so that one of the two sees it
        if self.capture is not None:
            self.capture.after_update(optimizer)

    def captures(self, capture: Capture) -> None:
        """The capture is there: what it has missed is told to it."""
        self.capture = capture
        for optimizer in self.updates:
            capture.after_update(optimizer)


class InFlight:
    """The saves of one checkpointer that have not ended, oldest first."""

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._changed = Waiting()
        self._jobs: list[SaveJob] = []
        self._meanwhile: list[Optimizer] | None = None
        self._closed = False

    @contextlib.contextmanager
    def registering(self) -> Iterator[None]:
        """Around the registration of a job and `add`: updates that other threads are at meanwhile are the job's.

        What was read of the state before such an update does not belong to what is read after it.
        """
        self._meanwhile = []
        try:
            yield
        finally:
            self._meanwhile = None

    def updated(self, optimizer: Optimizer) -> None:
        """An update has happened: what is being registered hears of it, and what is in flight."""
        meanwhile = self._meanwhile
        if meanwhile is not None:
            meanwhile.append(optimizer)
        for job in self.jobs():  # afterwards: what is added in between hears of it in one way at least
            job.updated(optimizer)

    def add(self, job: SaveJob, put: Callable[[SaveJob], None]) -> None:
        """Take ``job`` in and ``put`` it on its way.  `UnusableRequest` once closed."""
        with self._guard:
            if self._closed:
                raise UnusableRequest("this Checkpointer is closed; make a new one")
            self._jobs = [known for known in self._jobs if not known.handle.done()]
            if self._meanwhile is not None:
                job.updates = [*self._meanwhile, *under_way_elsewhere()]
            self._jobs.append(job)
            put(job)

    def remove(self, job: SaveJob) -> None:
        """It has ended, or is on its way beyond where saves land."""
        with self._guard:
            if job in self._jobs:
                self._jobs.remove(job)
        self._changed.notify_all()

    def jobs(self) -> list[SaveJob]:
        """Those that somebody still waits for."""
        with self._guard:
            return [job for job in self._jobs if not job.handle.done()]

    def wait_below(self, count: int, timeout_s: float | None = None) -> bool:
        """Block until fewer than ``count`` saves are in flight."""
        return self._changed.wait_for(lambda: len(self.jobs()) < count, timeout_s)

    def mark_ready(self, job: SaveJob) -> None:
        """Let those go on who wait for the capture to be there."""
        job.ready = True
        self._changed.notify_all()

    def wait_ready(self, job: SaveJob, timeout_s: float | None) -> bool:
        """Block until the capture of ``job`` is there, or never will be.  False when the time ran out."""
        return self._changed.wait_for(lambda: job.ready, timeout_s)

    def close(self) -> None:
        """No further save is taken in."""
        with self._guard:
            self._closed = True
