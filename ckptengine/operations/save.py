"""The verb save: register, capture, write, commit; everything after registration in the background.

Two threads per checkpointer.  The first agrees with the other ranks on the structure and feeds the engine; the second
seals the rank file and commits.  So a save streams while the one before it is being flushed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.optim.optimizer import Optimizer

from ckptengine.coordination.port import Coordinator, gather, publish, receive
from ckptengine.errors import CheckpointError, CoordinationFailed, SaveFailed, StorageFailed, Superseded
from ckptengine.layout.digest import standard_each
from ckptengine.operations.saving.attempts import Claims
from ckptengine.operations.saving.in_flight import InFlight, SaveJob
from ckptengine.operations.saving.one_place import require_one_place
from ckptengine.operations.saving.rank_writer import RankWriter, Sealed
from ckptengine.operations.saving.replicas import check_replicas, held_digests
from ckptengine.operations.saving.slow_storage import SlowStorage
from ckptengine.operations.saving.structure import Agreement, Refusal, Structure
from ckptengine.snapshot.capture import Capture
from ckptengine.snapshot.port import CaptureEngine
from ckptengine.snapshot.register import Planner
from ckptengine.snapshot.streams import behind
from ckptengine.state.collection import no_collection
from ckptengine.state.merge import merge_aliases, merge_values
from ckptengine.store import names
from ckptengine.store.files import Unsettled, make_dirs
from ckptengine.store.manifest import FileRecord, Manifest, TensorRecord
from ckptengine.store.rankfile import FileIdentity
from ckptengine.store.root import Root, utc_now
from ckptengine.version import version

log = logging.getLogger("ckptengine")

_CREATE_TRIES = 5
CANCEL_S = 5.0
"""How long closing waits for a save that it cancelled, and for each background thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSettings:
    """What all saves of a checkpointer have in common.  Times in seconds."""

    rank_timeout_s: float = 300.0
    stall_budget_s: float | None = None
    paranoid: bool = False


class Saver:
    """Runs saves for one checkpointer.  `submit` and `fence` from the training thread, the rest in the background."""

    def __init__(
        self, root: Root, port: Coordinator, engine: CaptureEngine, settings: SaveSettings, claims: Claims | None
    ) -> None:
        self._root, self._port, self._engine, self._settings = root, port, engine, settings
        self._planner = Planner()
        self._told: str | None = None
        self._proven = port.world == 1 or not root.shared
        self._agreement = Agreement(port, settings.rank_timeout_s, claims)
        self._to_capture: queue.SimpleQueue[SaveJob | Refusal | None] = queue.SimpleQueue()
        self._to_commit: queue.SimpleQueue[SaveJob | Refusal | None] = queue.SimpleQueue()
        self._flight = InFlight()
        self._slow = SlowStorage()
        self._onward: Callable[[SaveJob], None] | None = None
        self._threads = [
            threading.Thread(
                target=self._loop, args=(self._to_capture, self._capture), name="ckptengine-save", daemon=True
            ),
            threading.Thread(
                target=self._loop, args=(self._to_commit, self._commit), name="ckptengine-commit", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    # ---- training thread

    def submit(self, job: SaveJob) -> None:
        """Start a save.  `UnusableRequest` when closed."""
        self._flight.add(job, self._to_capture.put)

    def refuse(self, number: int, error: BaseException) -> None:
        """Save ``number`` could not be registered here: the other ranks must not wait for this one."""
        if self._port.world > 1:
            self._to_capture.put(Refusal(number, error))

    def fence(self, optimizer: Optimizer | None) -> None:
        """Block until what ``optimizer`` (None: anybody) overwrites is captured by every save in flight."""
        for job in self.in_flight():
            if job.capture is not None and job.capture.released:
                continue
            started_s = time.perf_counter()
            budget_s = self._settings.stall_budget_s
            ready = self._flight.wait_ready(job, budget_s)
            if job.capture is None and not ready:  # before it is looked at again: `_write` does so the other way round
                job.cancelled = SaveFailed(f"the save of step {job.step} did not start within the stall budget")
            if job.capture is not None:
                left_s = None if budget_s is None else max(0.0, budget_s - (time.perf_counter() - started_s))
                waiting_s = time.perf_counter()
                job.capture.fence(optimizer, left_s)
                self._slow.look(job.step, job.capture.progress(), time.perf_counter() - waiting_s)
            job.handle.add_ms("fence_ms", (time.perf_counter() - started_s) * 1e3)
            job.handle.event("fence", started_s, thread="training")

    def after_update(self, optimizer: Optimizer) -> None:
        self._flight.updated(optimizer)

    def registering(self) -> contextlib.AbstractContextManager[None]:
        """Around the registration of a job and its `submit`."""
        return self._flight.registering()

    def give_up(self, error: CheckpointError, *, superseded: bool = False) -> None:
        """Cancel what is in flight, for ``error``; ``superseded``: on purpose, so that the saves end as skipped."""
        for job in self.in_flight():
            job.cancelled, job.superseded = error, superseded
            if job.capture is not None:
                job.capture.cancel()

    def in_flight(self) -> list[SaveJob]:
        """Saves that have not ended, oldest first."""
        return self._flight.jobs()

    def wait_below(self, count: int, timeout_s: float | None = None) -> bool:
        """Block until fewer than ``count`` saves are in flight."""
        return self._flight.wait_below(count, timeout_s)

    def carry_on(self, onward: Callable[[SaveJob], None]) -> None:
        """From now on hand each job to ``onward``, on the commit thread, once its manifest is where saves land.

        Its handle is then ``onward``'s to advance, as is `SaveJob.record`, and `SaveJob.manifest` on rank 0.
        """
        self._onward = onward

    def close(self, timeout_s: float | None) -> bool:
        """Finish what is in flight, then stop the threads.  Past ``timeout_s`` saves are cancelled; False then."""
        self._flight.close()
        finished = self.wait_below(1, timeout_s)
        if not finished:
            self._cut_off(SaveFailed("the save was cut off: the checkpointer was closed"))
        self._to_capture.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # garbage may be collected on any thread
                thread.join(timeout=CANCEL_S)
        if self._engine.private:
            self._engine.close()
        return finished

    def _cut_off(self, error: CheckpointError) -> None:
        """Cancel what is in flight, and wait no longer for it than `CANCEL_S`: storage may hang for ever."""
        jobs = self.in_flight()
        cancelling = threading.Thread(target=self.give_up, args=(error,), name="ckptengine-cancel", daemon=True)
        cancelling.start()
        cancelling.join(CANCEL_S)
        for job in jobs:
            job.cancelled = error
            job.handle.fail(error)

    # ---- background

    def _loop(self, jobs: queue.SimpleQueue[SaveJob | Refusal | None], work: Callable[[SaveJob], None]) -> None:
        while True:
            job = jobs.get()
            if job is None:
                if jobs is self._to_capture:
                    self._to_commit.put(None)
                return
            if isinstance(job, Refusal):
                with contextlib.suppress(CoordinationFailed):  # nobody is left to tell
                    self._agreement.refuse(job)
                continue
            try:
                work(job)
            except CheckpointError as error:
                self._failed(job, error)
            except BaseException as error:  # a handle never loses an error
                failed = SaveFailed(f"the save of step {job.step} failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                self._failed(job, failed)
            finally:
                self._flight.mark_ready(job)

    def _capture(self, job: SaveJob) -> None:
        started_s = time.perf_counter()
        structure = job.structure = self._agreement.settle(job.number, job.step, job.flat)
        job.run, job.attempt = self._agreement.run, self._agreement.attempt
        job.handle.event("agree", started_s)
        try:
            self._write(job, structure)
        except Exception as error:
            self._report(job, error)
            raise
        self._to_commit.put(job)

    def _write(self, job: SaveJob, structure: Structure) -> None:
        job.check()
        rank = self._port.rank
        directory = self._root.step_path(job.step)
        identity = self._identity(job)
        path, known = directory / names.rank_file(rank, job.attempt, job.number), job.registered
        with behind(known.marks):
            extents, keys, lazy = self._planner.plan(known, structure, rank)
            job.writer = self._create(path, identity, keys)
            started_s = time.perf_counter()
            work = job.writer.start(self._engine, extents)
        job.handle.track(work.progress)
        job.captures(Capture(work, lazy, known.versions, known.witnesses, paranoid=self._settings.paranoid))
        job.check()  # who gave it up before there was a capture could cancel none
        assert job.capture is not None
        if self._port.world > 1:  # while the engine streams, and before the fence can let go
            job.held = held_digests(job.registered, structure, rank)
        self._flight.mark_ready(job)
        job.capture.finish()
        if job.capture.error is not None:
            raise job.capture.error
        job.handle.event("capture", started_s)
        job.handle.advance("captured")

    def _create(self, path: Path, identity: FileIdentity, keys: npt.NDArray[np.uint32]) -> RankWriter:
        """The rank file, in a step directory that is there: retention removes empty ones, ours in between too."""
        for _ in range(_CREATE_TRIES):
            make_dirs(self._root.ops, path.parent, self._root.mode)
            try:
                return RankWriter(self._root.ops, path, identity, self._root.file_mode, keys)
            except StorageFailed as failed:
                if not isinstance(failed.__cause__, FileNotFoundError):
                    raise
                refused = failed
        raise refused

    def _identity(self, job: SaveJob) -> FileIdentity:
        return FileIdentity(
            run=job.run,
            attempt=job.attempt,
            save=job.number,
            step=job.step,
            rank=self._port.rank,
            world=self._port.world,
        )

    def _commit(self, job: SaveJob) -> None:
        assert job.writer is not None and job.capture is not None and job.structure is not None
        started_s = time.perf_counter()
        try:
            sealed = job.writer.seal(job.flat.rank_values)
            if job.capture.error is not None:
                raise job.capture.error
            job.check()
        except Exception as error:
            self._report(job, error)
            raise
        job.handle.event("seal", started_s)
        job.handle.extend_trace(job.writer.trace())
        started_s = time.perf_counter()
        self._publish(job, job.structure, sealed)
        job.handle.event("commit", started_s)
        if self._onward is None:
            job.handle.advance("committed")
            self._forget(job)  # before the callbacks of whoever waits for the end
            job.handle.advance("durable")
            return
        job.record = FileRecord(sealed.nbytes, sealed.tail_crc)
        job.registered.release()
        job.writer = None  # the file counts from here on, whatever goes wrong
        self._onward(job)
        job.manifest = None
        self._forget(job)

    def _report(self, job: SaveJob, error: Exception) -> None:
        """Tell the other ranks that this one failed, so that nobody waits for it."""
        if self._port.world > 1:
            note = {"error": f"rank {self._port.rank}: {error}", "unsettled": False}
            with contextlib.suppress(CoordinationFailed):  # nobody is left to tell; the error that led here counts
                if self._port.rank == 0:
                    publish(self._port, f"committed/{job.number}", note)
                else:
                    self._port.put(f"sealed/{job.number}/{self._port.rank}", json.dumps(note).encode())

    def _publish(self, job: SaveJob, structure: Structure, sealed: Sealed) -> None:
        """Bring all ranks' parts together; rank 0 commits and tells the others."""
        note = {
            "file": [sealed.nbytes, sealed.tail_crc],
            "crcs": [list(sealed.contributions), list(sealed.contributions.values())],
            "aliases": dict(job.flat.aliases),
            "values": job.flat.values,
            "held": job.held,
        }
        key = f"committed/{job.number}"
        if self._port.rank != 0:
            job.unsettled = True  # from here on rank 0 may commit, however late, whatever becomes of this rank
            gather(self._port, f"sealed/{job.number}", note, self._settings.rank_timeout_s)
            answer = receive(self._port, key, 2 * self._settings.rank_timeout_s)
            if "error" in answer:
                job.unsettled = answer["unsettled"]
                raise SaveFailed(f"step {job.step} was not committed: {answer['error']}")
            return
        try:
            gathered = gather(self._port, f"sealed/{job.number}", note, self._settings.rank_timeout_s) or []
            if self._told is not None:  # every rank has read it: each has come to the next commit
                self._port.delete(self._told)
            self._told = key
            failures = [one["error"] for one in gathered if "error" in one]
            if failures:
                raise SaveFailed(f"step {job.step} was not committed: {'; '.join(failures[:4])}")
            if self._port.world > 1:
                check_replicas(structure, gathered)
            with no_collection():  # a manifest is a few objects per tensor, all of them needed until it is written
                job.manifest = self._manifest(job, structure, gathered)
                if not self._proven:
                    require_one_place(self._root, job.manifest)
                    self._proven = True
                self._root.commit(job.manifest)
        except Exception as error:
            job.unsettled = isinstance(error, (Unsettled, Superseded))
            publish(self._port, key, {"error": str(error), "unsettled": job.unsettled})
            raise
        publish(self._port, key, {})

    def _manifest(self, job: SaveJob, structure: Structure, notes: Sequence[Mapping[str, Any]]) -> Manifest:
        raws = np.zeros(len(structure.tensors), np.uint64)
        for one in notes:
            ordinals, found = one["crcs"]
            raws[np.array(ordinals, np.int64)] ^= np.array(found, np.uint64)
        crcs = standard_each(raws, np.array([t.nbytes for t in structure.tensors], np.int64)).tolist()
        tensors = [
            TensorRecord(t.name, t.dtype, t.shape, t.layout, t.writer, crc)
            for t, crc in zip(structure.tensors, crcs, strict=True)
        ]
        return Manifest(
            run=job.run,
            attempt=job.attempt,
            save=job.number,
            step=job.step,
            world=self._port.world,
            created=utc_now(),
            writer=f"ckptengine {version}",
            metrics=dict(job.metrics),
            layouts=structure.documents,
            tensors=tensors,
            aliases=merge_aliases([one["aliases"] for one in notes], [frozenset(t.name for t in structure.tensors)]),
            values=merge_values([one["values"] for one in notes]),
            files=[FileRecord(*one["file"]) for one in notes],
        )

    def _failed(self, job: SaveJob, error: CheckpointError) -> None:
        if job.capture is not None:
            job.capture.cancel()
        if job.writer is not None:
            job.writer.abort(keep=job.unsettled)
        self._forget(job)
        if job.superseded:
            job.handle.advance("skipped")
        else:
            log.error("save of step %d failed: %s", job.step, error)
            job.handle.fail(job.cancelled or error)

    def _forget(self, job: SaveJob) -> None:
        """Let go of everything that the job held of the live state."""
        job.registered.release()
        job.writer = None
        self._flight.remove(job)
