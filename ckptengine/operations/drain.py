"""The verb drain: a checkpoint committed on one tier is carried to the next and committed there, in the background.

Each rank carries its own files; when every rank's have arrived and were found equal, one rank puts the manifest there,
last and exclusively, and all ranks learn that it is done.  One step at a time, in the order of `Drain.submit`, which
must be the same on all ranks.  Whatever fails, the step stays committed where it was, and can be submitted again: parts
that have arrived are not sent a second time, not even by another process.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptengine.coordination.alone import Alone
from ckptengine.coordination.port import Coordinator
from ckptengine.errors import CheckpointError, Conflict, Damaged, RankTimeout, SaveFailed, UnusableRequest
from ckptengine.operations.draining.commit import Named, publish
from ckptengine.operations.draining.peers import Peers
from ckptengine.operations.draining.progress import progress_log
from ckptengine.operations.draining.transfer import Budget, DrainFile, Moved, Throttle, Transfer
from ckptengine.tiers.loop import IoLoop
from ckptengine.tiers.port import TierPort

log = logging.getLogger("ckptengine")

_POLL_S = 1.0
_MAX_PENDING = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainSettings:
    """Bounds of a drain.  ``memory_bytes``: parts in memory at once; ``max_bytes_per_s``: a cap per rank, or None."""

    part_bytes: int = 8 << 20
    memory_bytes: int = 64 << 20
    parallel_parts: int = 16
    max_bytes_per_s: float | None = None
    rank_timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What carrying one step took on this rank."""

    step: int
    target: str
    seconds: float
    sent_bytes: int
    resumed_bytes: int
    read_back_bytes: int


@dataclass(slots=True)
class _Job:
    step: int
    files: tuple[DrainFile, ...]
    manifest: Named | None
    companions: tuple[Named, ...]
    future: concurrent.futures.Future[DrainReport]
    key: str
    tried: Callable[[CheckpointError], None]
    done_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes


class Drain:
    """Carries steps from ``source`` to ``target`` on ``loop``, with a thread of its own to keep their order.

    ``port``: the ranks that drain together.  Its keys follow from ``hop`` (what the ranks call this drain, each of them
    alike; default: from the two places), the step, and how often it came.
    ``again(tries)``: asked on rank 0 when a step could not be carried, how long to wait before the next try; None gives
    it up.  What comes behind waits meanwhile, so that all ranks keep one order.  ``guard``: called with a manifest
    right before it is put; it raises where this job may not do so any more, or must not.
    """

    def __init__(
        self,
        source: TierPort,
        target: TierPort,
        loop: IoLoop,
        *,
        port: Coordinator | None = None,
        settings: DrainSettings | None = None,
        again: Callable[[int], float | None] | None = None,
        guard: Callable[[Named], None] | None = None,
        hop: str | None = None,
    ) -> None:
        self._source, self._target, self._loop = source, target, loop
        self._again, self._guard = again, guard
        self._port: Coordinator = port or Alone()
        self._settings = settings or DrainSettings()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: list[_Job] = []
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self._name = hop or f"{zlib.crc32(source.label.encode()):08x}-{zlib.crc32(target.label.encode()):08x}"
        self._closed = False
        self._stopping = threading.Event()
        self._peers = Peers(self._port, self._settings.rank_timeout_s, self._stopping)
        self._running: concurrent.futures.Future[list[Moved]] | None = None
        self._limits: tuple[Budget, Throttle] | None = None
        self._thread = threading.Thread(target=self._serve, name="ckptengine-drain", daemon=True)
        self._thread.start()

    def submit(
        self,
        step: int,
        files: Sequence[DrainFile],
        manifest: Named | None,
        companions: Sequence[Named] = (),
        tried: Callable[[CheckpointError], None] = lambda error: None,
    ) -> concurrent.futures.Future[DrainReport]:
        """Carry ``files`` of ``step``, this rank's own; returns at once.

        ``manifest``: what commits the step on the target, given by exactly one rank, put there last.  ``companions``:
        small objects that must be there before it (attempt records); those that exist must be equal.  ``tried``: told,
        on the drain's thread, of each try that failed and that another one follows.  The future's error is one of
        `CheckpointError`; `CoordinationFailed` says that another rank failed.
        """
        future: concurrent.futures.Future[DrainReport] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise UnusableRequest(f"the drain to {self._target.label} is closed; step {step} cannot be submitted")
            if len(self._jobs) >= _MAX_PENDING:
                raise SaveFailed(
                    f"{len(self._jobs)} steps wait to be carried to {self._target.label}; it cannot keep up: "
                    f"give that tier a longer interval"
                )
            count = self._counts[step] = self._counts.get(step, 0) + 1
            key = f"drain/{self._name}/{step}/{count}"
            job = _Job(step, tuple(files), manifest, tuple(companions), future, key, tried)
            future.set_running_or_notify_cancel()  # not to be cancelled: other ranks count on this one
            self._jobs.append(job)
            self._queue.put(job)
        return future

    @property
    def pending(self) -> tuple[int, ...]:
        """Steps that still have to be carried, in order; the source must keep them."""
        with self._lock:
            return tuple(job.step for job in self._jobs)

    def progress(self, step: int) -> tuple[int, int]:
        """(bytes that have arrived, bytes in all) of this rank's files of a pending step; (0, 0) when not pending."""
        with self._lock:
            for job in self._jobs:
                if job.step == step:
                    return min(job.done_bytes, _size(job)), _size(job)
        return 0, 0

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what is pending, at most ``timeout_s``; then give up the rest, which a later process can go on with.

        Returns whether everything was carried.  Futures of what was given up hold a `SaveFailed`.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join(timeout_s)
        finished = not self._thread.is_alive()
        with self._lock:
            self._stopping.set()
            running = self._running
        if not finished:
            if running is not None:
                running.cancel()
            grace_s = 0.0 if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            self._thread.join(grace_s + 2 * _POLL_S)
        with self._lock:
            left, self._jobs = self._jobs, []
        for job in left:
            finished = False
            if not job.future.done():
                job.future.set_exception(self._given_up(job))
        return finished

    # -- the drain's own thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._stopping.is_set():
                return
            tries, key = 0, job.key
            while True:
                outcome = self._attempt(job)
                if isinstance(outcome, DrainReport):
                    break
                tries += 1
                wait_s = self._wait_s(job, tries, outcome)
                if wait_s is None:
                    break
                log.warning(
                    "step %d could not be carried to %s, next try in %g s: %s",
                    *(job.step, self._target.label, wait_s, outcome),
                    extra=_fields(job, self._target.label, tries=tries, error=outcome.code),
                )
                job.tried(outcome)
                if self._stopping.wait(wait_s):
                    break
                job.key, job.done_bytes = f"{key}/{tries}", 0
            self._settle(job, outcome)

    def _attempt(self, job: _Job) -> DrainReport | CheckpointError:
        started_s = time.monotonic()
        try:
            moved = self._carry(job)
        except BaseException as error:
            return error if isinstance(error, CheckpointError) else self._unexpected(job, error)
        return DrainReport(
            step=job.step,
            target=self._target.label,
            seconds=time.monotonic() - started_s,
            sent_bytes=sum(one.sent_bytes for one in moved),
            resumed_bytes=sum(one.resumed_bytes for one in moved),
            read_back_bytes=sum(one.read_back_bytes for one in moved),
        )

    def _wait_s(self, job: _Job, tries: int, error: CheckpointError) -> float | None:
        """How long to wait before the next try, as rank 0 says; None: there is none."""
        again = self._again
        if again is None or self._stopping.is_set():
            return None
        final = isinstance(error, Conflict | Damaged | RankTimeout | UnusableRequest)
        return self._peers.decided(f"{job.key}/again", lambda: None if final else again(tries))

    def _carry(self, job: _Job) -> list[Moved]:
        moved: list[Moved] = []
        failure: CheckpointError | None = None
        said = f"step {job.step} was not carried to {self._target.label}"
        try:
            moved = self._copy(job)
        except CheckpointError as error:
            failure = error
        self._peers.agree(f"{job.key}/arrived", said, failure)
        try:
            if job.manifest is not None:
                if self._guard is not None:
                    self._guard(job.manifest)
                self._loop.run(publish(self._target, job.manifest, job.companions))
        except CheckpointError as error:
            failure = error
        self._peers.agree(f"{job.key}/published", said, failure)
        for file in job.files:
            progress_log(self._source_of(file), self._target, file.name, file.size_bytes).forget()
        return moved

    def _copy(self, job: _Job) -> list[Moved]:
        copying = self._loop.submit(self._copy_all(job))
        with self._lock:
            self._running = copying
        try:
            return copying.result()
        except concurrent.futures.CancelledError:
            raise self._given_up(job) from None
        finally:
            with self._lock:
                self._running = None

    async def _copy_all(self, job: _Job) -> list[Moved]:
        settings = self._settings
        if self._limits is None:
            budget = Budget(settings.memory_bytes, settings.parallel_parts)
            self._limits = budget, Throttle(settings.max_bytes_per_s)
        transfers = [
            Transfer(self._source_of(file), self._target, file, settings.part_bytes, *self._limits, on_bytes=job.add)
            for file in job.files
        ]
        return [await transfer.run() for transfer in transfers]

    def _source_of(self, file: DrainFile) -> TierPort:
        return self._target if file.is_there else self._source

    def _settle(self, job: _Job, outcome: DrainReport | CheckpointError) -> None:
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)
        if isinstance(outcome, DrainReport):
            sent = {"seconds": outcome.seconds, "sent_bytes": outcome.sent_bytes}
            fields = _fields(job, self._target.label, **sent)
            log.info("step %d has arrived on %s", job.step, self._target.label, extra=fields)
        else:
            fields = _fields(job, self._target.label, error=outcome.code)
            log.warning("the drain of step %d failed: %s", job.step, outcome, extra=fields)
        if job.future.done():
            return
        if isinstance(outcome, DrainReport):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    def _given_up(self, job: _Job) -> SaveFailed:
        return SaveFailed(
            f"step {job.step} was not carried to {self._target.label}: the drain was closed before it was done; "
            f"it is still on {self._source.label}, and the next drain goes on where this one stopped"
        )

    def _unexpected(self, job: _Job, error: BaseException) -> SaveFailed:
        failed = SaveFailed(
            f"step {job.step} was not carried to {self._target.label}: {type(error).__name__}; this is a defect"
        )
        failed.__cause__ = error
        return failed


def _fields(job: _Job, target: str, **more: object) -> dict[str, object]:
    """Structured fields of a log line."""
    return {"ckptengine": {"step": job.step, "target": target, **more}}


def _size(job: _Job) -> int:
    return sum(file.size_bytes for file in job.files)
