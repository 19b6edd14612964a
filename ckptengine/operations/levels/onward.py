"""What becomes of a save that has landed: its handle follows it from tier to tier, and its cost is measured."""

from __future__ import annotations

import concurrent.futures
import logging
import threading

from ckptengine.errors import CheckpointError, NotFound, SaveFailed
from ckptengine.operations.levels.level import Landed
from ckptengine.operations.levels.levels import Levels
from ckptengine.operations.levels.tally import Tally
from ckptengine.operations.retain import Facts
from ckptengine.operations.saving.in_flight import SaveJob
from ckptengine.store.history import CommitRef

log = logging.getLogger("ckptengine")


class Onward:
    """Hands landed saves to the levels; called on the commit thread, for every save on every rank, in order.

    A handle is ``committed`` from the first tier on that survives a power cut (the root at the latest), and ``durable``
    on the root.  One whose step no tier further on wants ends where it has come to.
    """

    def __init__(self, levels: Levels, tally: Tally) -> None:
        self._levels, self._tally = levels, tally
        self._landed: threading.Event | None = None
        self._released = threading.Event()

    @property
    def is_single(self) -> bool:
        """Whether saves land on the root itself."""
        return self._levels.is_single

    def hold(self) -> threading.Event:
        """Until `release`, let the next save land and go no further; the event that is set when it has landed."""
        self._released.clear()
        self._landed = threading.Event()
        return self._landed

    def release(self) -> None:
        """Let go on what `hold` has kept."""
        self._landed = None
        self._released.set()

    def resume(self, ref: CommitRef) -> None:
        """Carry on what an earlier job left; called by all ranks alike.  A failure shows in the log and the counts."""

        def ended(done: concurrent.futures.Future[int]) -> None:
            error = _error_of(done, ref.step)
            if error is not None:
                self._tally.failed(error)

        tally = self._tally
        try:
            done = self._levels.resume(ref, lambda number: tally.arrived(number, ref.step), tally.tried)
        except NotFound as nowhere:  # it was restored from what is left of it
            log.warning("step %d, which an earlier job left, is not carried on: %s", ref.step, nowhere)
            return
        if done is not None:
            done.add_done_callback(ended)

    def __call__(self, job: SaveJob) -> None:
        """Carry one job's step on.  A failure ends its handle; the step stays where it has come to."""
        assert job.record is not None
        handle, levels = job.handle, self._levels

        def arrived(number: int) -> None:
            self._tally.arrived(number, job.step)
            if levels.is_committed(number):
                handle.advance("committed")
            if number == levels.last:
                handle.advance("durable")

        def ended(done: concurrent.futures.Future[int]) -> None:
            error = _error_of(done, job.step)
            if error is None:
                handle.end()
            else:
                handle.fail(error)

        def tried(error: CheckpointError) -> None:
            self._tally.tried(error)
            handle.tried(error)

        arrived(0)
        handle.follow(lambda: levels.progress(job.step))
        held = self._landed
        if held is not None:
            held.set()
            self._released.wait()
        landed = Landed(
            step=job.step,
            attempt=job.attempt,
            save=job.number,
            files={self._levels.rank: job.record},
            manifest=job.manifest.encode() if job.manifest is not None else None,
            facts=Facts.of(job.manifest) if job.manifest is not None else None,
            all_the_way=job.all_the_way,
        )
        levels.landed(landed, arrived, tried).add_done_callback(ended)


def _error_of(done: concurrent.futures.Future[int], step: int) -> CheckpointError | None:
    """Why a step stays where it is, told in the log; None where it has come as far as it is meant to."""
    error = done.exception()
    if error is None:
        return None
    if not isinstance(error, CheckpointError):
        failed = SaveFailed(f"step {step} was not carried on: {type(error).__name__}: {error}")
        failed.__cause__ = error
        error = failed
    fields = {"ckptengine": {"step": step, "error": error.code}}
    log.error("step %d stays where it is: %s", step, error, extra=fields)
    return error
