"""The facade: wires the parts together, holds no logic of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, SupportsIndex

from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from ckptengine.coordination.choose import choose
from ckptengine.errors import CheckpointError, RestoreIncomplete, UnusableRequest
from ckptengine.operations.levels.places import Places, Writing, check_places
from ckptengine.operations.levels.tally import Status
from ckptengine.operations.load import load_path
from ckptengine.operations.opening import tell_of_foreign
from ckptengine.operations.restore import RestoreRequest, WorldPolicy
from ckptengine.operations.save import Saver, SaveSettings
from ckptengine.operations.saving.callbacks import Callbacks
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.operations.saving.in_flight import SaveJob
from ckptengine.operations.saving.metrics import metrics_of
from ckptengine.operations.saving.overlap import Overlap, OverlapPolicy, check_policy
from ckptengine.operations.saving.rhythm import Rhythm
from ckptengine.operations.saving.step_number import step_number
from ckptengine.operations.saving.troubles import Troubles
from ckptengine.operations.stopping.ending import CLOSE_AT_EXIT_S, Ending
from ckptengine.operations.stopping.last_save import LastSave
from ckptengine.operations.stopping.stopping import EXIT_STATUS
from ckptengine.policy.failure import FailurePolicy, failure_policy
from ckptengine.policy.interval import Interval
from ckptengine.policy.keep import Keep
from ckptengine.snapshot import fence
from ckptengine.snapshot.engines import engine_for
from ckptengine.snapshot.native_engine import DEFAULT, EngineSettings
from ckptengine.snapshot.register import Registrar
from ckptengine.state.walker import Walker
from ckptengine.store.files import FileOps
from ckptengine.tiers.spec import Tier

CLOSE_AFTER_ERROR_S = 30.0
"""How long `close` waits for saves in flight when the training loop ended with an exception."""


class Checkpointer:
    """Saves a training state asynchronously under a root, and restores it onto whatever layout it finds itself in.

    Every rank constructs it with the same arguments and makes the same calls.  Use it as a context manager.

    Args:
        state: nested live state (modules, optimizers, schedulers, loaders, tensors, plain values).
        root: directory or fsspec URL where durable checkpoints rest.
        interval: when `step` saves; None: only `save` does.
        keep: which checkpoints of the root are kept; None: all.
        tiers: faster tiers in front of the root, fastest first.  Saves land on the first and are carried on in the
            background, as far as the tiers' intervals want; an explicit `save` goes all the way.
        on_failure: ``"raise"``, or `Tolerate`: what a failed save does to the training loop.
        overlap: when a save comes while the ones before are in flight: ``"wait"`` for room, ``"skip"`` this one, or
            ``"latest"``: give up the one in flight.
        process_group: the ranks that take part; default: all, where torch.distributed is initialised.
        run: the run's identity; default: that of the root, or a new one.
        start_from: a checkpoint, ours or foreign, to start from when the root is empty.
        rules: what the pieces of ``start_from`` mean, as in `ckptengine.open`.
        on_world_change: what becomes of random streams and per-rank values when the number of ranks is another than at
            the save: ``"derive"`` them reproducibly, ``"exact"`` by rank number, or ``"fail"``.
        random: whether the process's random streams are part of the checkpoint.
        mode: permissions of what is written; default: the umask.
        rank_timeout_s: how long ranks wait for one another in the background.
        stall_budget_s: how long one fence may block training before the save is given up; None: no limit.
        arena_bytes: host memory of the capture engine, whatever the size of the state.
        max_bytes_per_s: a cap on what saves write; an update that waits lifts it.
        low_priority: the engine's threads and their I/O go last.
        paranoid: digest everything again before the fence lets go, not samples.
        sigterm_s: watch for SIGTERM: the next `step` saves, waits for it up to this long after the signal and exits
            with status 143, on all ranks at one step; None: leave the signal alone.
        file_ops: file operations beneath the store (for fault injection).
        linear: the saves are one line of training: a first save at step s leaves what the root holds beyond s behind.
            False: they add to whatever the root holds, as `ckptengine.save` does.

    Raises:
        RootInUse: another live job holds the root.
        Conflict: what lies under the root or on a tier was saved by another run, or for another root.
    """

    def __init__(
        self,
        state: Any,
        root: str | os.PathLike[str],
        *,
        interval: Interval | None = None,
        keep: Keep | None = None,
        tiers: Sequence[Tier] = (),
        on_failure: Literal["raise"] | FailurePolicy = "raise",
        overlap: OverlapPolicy = "wait",
        process_group: ProcessGroup | None = None,
        run: str | None = None,
        start_from: str | os.PathLike[str] | None = None,
        rules: str | os.PathLike[str] | None = None,
        random: bool = True,
        on_world_change: WorldPolicy = "derive",
        mode: int | None = None,
        rank_timeout_s: float = 300.0,
        stall_budget_s: float | None = None,
        arena_bytes: int = DEFAULT.arena_bytes,
        max_bytes_per_s: int | None = None,
        low_priority: bool = False,
        paranoid: bool = False,
        sigterm_s: float | None = None,
        file_ops: FileOps | None = None,
        linear: bool = True,
    ) -> None:
        check_policy(overlap)
        check_places(tiers, interval, keep)
        wanted = EngineSettings(arena_bytes=arena_bytes, max_bytes_per_s=max_bytes_per_s, low_priority=low_priority)
        self._pid, self._closed, self._calling = os.getpid(), False, threading.RLock()
        self._broken: RestoreIncomplete | None = None
        self._state, self._start_from, self._rules, self._random = state, start_from, rules, random
        self._on_world_change, self._timeout_s = on_world_change, rank_timeout_s
        policy = failure_policy(on_failure)
        self._walker, self._registrar, self._saves, self._restores = Walker(state, random=random), Registrar(), 0, 0
        self._troubles, self._callbacks, self._last = Troubles(policy), Callbacks(), None
        engine = engine_for(wanted, file_ops)
        settings = SaveSettings(rank_timeout_s=rank_timeout_s, stall_budget_s=stall_budget_s, paranoid=paranoid)
        writing = Writing(run=run, linear=linear, mode=mode, file_ops=file_ops)
        alike = partial(Checkpointer, process_group=process_group, random=False, linear=False)
        self._weights = partial(alike, mode=mode, rank_timeout_s=rank_timeout_s, max_bytes_per_s=max_bytes_per_s)
        self._port = port = choose(process_group, rank_timeout_s)
        self._places = places = Places(
            root, tiers, interval, keep, port=port, policy=policy, writing=writing, timeout_s=rank_timeout_s
        )
        with contextlib.ExitStack() as undoing:  # whatever goes wrong from here on lets the root go
            undoing.callback(port.close)
            undoing.callback(places.close)
            self._rhythm, self._tally = Rhythm(places.interval, port, rank_timeout_s), places.tally()
            self._saver = saver = Saver(places.landing, port, engine, settings, places.claims)
            undoing.callback(saver.close, 0.0)
            onward = places.carry_on(saver, self._tally, self._rhythm)
            self._overlap = Overlap(overlap, saver, port, rank_timeout_s)
            if sigterm_s is not None:
                self._last = LastSave(sigterm_s, port, onward, self._tally, Tier(root).path, rank_timeout_s)
            stopping = None if self._last is None else self._last.stopping
            self._ending = Ending(saver, self._troubles, stopping, places, self._callbacks, port, self._pid)
            undoing.pop_all()
        self._go_live()

    def _go_live(self) -> None:
        """Hear of every update; end when it is collected, or at exit, if nobody closes it."""
        fence.watch(self)
        self._finalizer = weakref.finalize(self, self._ending.collected)
        # At exit our own hook ends it: that of the native engine, which weakref's may follow, would cut saves off.
        self._finalizer.atexit = False
        _open.add(self)

    # ---- saving

    def save(self, step: SupportsIndex, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle:
        """Start one checkpoint of ``step`` (anything that is a whole number) now; returns as soon as the capture is
        registered.

        Raises the error of an earlier save, as ``on_failure`` says, and `UnsupportedValue` for a value in the state
        that has no encoding; everything that goes wrong later is on the handle.  Where one rank raises here, the
        handles of the others fail with its error.
        """
        return self._save(step, metrics, all_the_way=True)

    def _save(self, step: SupportsIndex, metrics: Mapping[str, Any] | None, *, all_the_way: bool) -> SaveHandle:
        self._usable()
        with self._calling:  # the walk and the number of a save are one thread's at a time
            return self._start(step, metrics, all_the_way)

    def _start(self, step: SupportsIndex, metrics: Mapping[str, Any] | None, all_the_way: bool) -> SaveHandle:
        refusal: CheckpointError | None = None
        try:
            step = step_number(step)
            self._troubles.surface(step)
        except CheckpointError as error:
            if self._port.world == 1:
                raise
            refusal = error
        started_s = time.perf_counter()
        self._saves += 1  # whatever happens: ranks tell saves apart by it
        admitted = self._overlap.admit(self._saves)
        handle: SaveHandle | None = None
        try:
            if refusal is not None:
                raise refusal
            handle = SaveHandle(step_number(step), self._callbacks)
            if not admitted:
                handle.advance("skipped")
                return handle
            with self._saver.registering():
                self._saver.submit(self._register(handle, metrics, all_the_way))
        except BaseException as error:
            if handle is not None:
                handle.advance("skipped")  # nobody will ever see it, and from now on no fence waits for it
            if admitted:
                self._saver.refuse(self._saves, error)
                if isinstance(step, int):
                    self._rhythm.saved(step)  # as the other ranks have it
            raise
        handle.add_ms("blocked_ms", (time.perf_counter() - started_s) * 1e3)
        handle.event("save", started_s, thread="training")
        return handle

    def _register(self, handle: SaveHandle, metrics: Mapping[str, Any] | None, all_the_way: bool) -> SaveJob:
        """What a save needs of the live state; its handle is watched from now on."""
        flat = self._walker.flatten()
        job = SaveJob(
            step=handle.step,
            number=self._saves,
            flat=flat,
            registered=self._registrar.register(flat.tensors),
            metrics=metrics_of(metrics),
            handle=handle,
            all_the_way=all_the_way,
        )
        self._troubles.watch(handle)
        handle.on_done(self._rhythm.ended)
        self._tally.started(handle)
        self._rhythm.saved(handle.step)
        return job

    def step(self, step: SupportsIndex, *, metrics: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """The training-loop hook: saves when the interval says so, else returns None.

        Also where the error of a background save surfaces, according to ``on_failure``.  Metrics are read only when it
        saves.
        """
        self._usable()
        step = step_number(step)
        last = self._last if self._last is not None and self._last.stopping.decided() else None
        due = self._rhythm.due(step)  # asked of every rank at every call, whatever this one has to complain of
        if last is None and due:
            return self._save(step, metrics, all_the_way=False)
        self._troubles.surface(step)
        if last is None:
            return None
        self._saver.wait_below(1, last.stopping.left_s())  # so that no overlap policy leaves the last one out
        last.run(self._state, step, lambda: self._save(step, metrics, all_the_way=True), self._weights)
        self._close(last.stopping.left_s())
        raise SystemExit(EXIT_STATUS)

    def fence(self) -> None:
        """Block until everything that the next update overwrites has been captured.

        Runs by itself before every torch optimizer's step; call it before any other in-place change of the state (an
        EMA, a CUDA graph replay, an update that torch's optimizers do not make).
        """
        self.before_update(None)

    def before_update(self, optimizer: Optimizer | None) -> None:
        """For the optimizer hooks; see `fence`."""
        if os.getpid() == self._pid:
            self._saver.fence(optimizer)

    def after_update(self, optimizer: Optimizer) -> None:
        """For the optimizer hooks: an update of the captured state has happened."""
        if os.getpid() == self._pid:
            self._saver.after_update(optimizer)

    def wait(self, stage: str = "durable", timeout_s: float | None = None) -> bool:
        """Wait until every save in flight has reached ``stage``, or has come as far as it is meant to.

        False when the time ran out; raises what failed.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for handle in self._troubles.under_way():
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            if not handle.wait(stage, left_s) and not handle.done():
                return False
        return True

    def status(self) -> Status:
        """Totals since this checkpointer was made: saves by how they ended, time and bytes they took, the age of the
        newest durable one, and what is on its way to each tier."""
        return self._tally.status()

    def on_end(self, call: Callable[[SaveHandle], object]) -> None:
        """Have ``call(handle)`` run, on a background thread, whenever a save ends; see `ckptengine.observe`."""
        self._tally.on_end(call)

    # ---- restoring

    def restore(
        self, step: SupportsIndex | None = None, *, names: Sequence[str] | None = None, strict: bool = True
    ) -> int | None:
        """Fill the state in place from the newest step that verifies, or from ``step``, or only ``names`` of it.

        Falls back over damaged steps and says so in the log.  None only when no checkpoint exists at all (the log says
        so where another framework's lies in the root); of ``start_from``, which is used while the root is empty, the
        step is the one that it records, or 0.  All ranks agree on one step; every rank must call it.  After an older
        step than the newest, what came after belongs to an abandoned line of history.

        Raises:
            NotFound: there is no such step.
            StateMismatch: the state does not fit; every difference in one report, nothing was changed.
            Damaged: checkpoints exist and none is good; nothing was changed.
            RestoreIncomplete: damage showed while filling and no copy is left; further steps and saves are refused.
        """
        self._usable()
        with self._calling:
            return self._restore(None if step is None else step_number(step), names, strict)

    def _restore(self, step: int | None, names: Sequence[str] | None, strict: bool) -> int | None:
        self._saver.wait_below(1)
        self._restores += 1
        request = RestoreRequest(
            state=self._state,
            names=names,
            strict=strict,
            random=self._random,
            on_world_change=self._on_world_change,
            timeout_s=self._timeout_s,
        )
        try:
            restored = self._places.restore(request, self._restores, step)
            if restored is None and self._start_from is not None and step is None:
                self._restores += 1
                return load_path(self._start_from, None, self._rules, self._port, request, self._restores)
        except RestoreIncomplete as error:
            self._broken = error
            raise
        except BaseException as error:
            if request.touched:  # half filled, whatever it was that came in between
                self._broken = RestoreIncomplete(f"a restore was cut short by {type(error).__name__}: {error}")
            raise
        if restored is None:
            if self._start_from is None and self._port.rank == 0:
                tell_of_foreign(self._places.landing.path)
            return None
        if self._places.claims is not None and names is None:
            self._places.claims.restored(restored.step)
        return restored.step

    # ---- ending

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is in flight and let the root go.  Raises the error of a failed save nobody has heard of, and
        `SystemExit` where SIGTERM came when the loop did not call `step` any more."""
        self._close(timeout_s)
        if os.getpid() == self._pid:
            if self._last is not None and self._last.stopping.is_unanswered:
                raise SystemExit(EXIT_STATUS)
            self._troubles.surface(None)

    def _close(self, timeout_s: float | None) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        try:
            self._ending.end(timeout_s)
        finally:  # not before: what is in flight is to be fenced until its end
            fence.unwatch(self)
            self._finalizer.detach()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            self.close()
            return
        try:
            self._close(CLOSE_AFTER_ERROR_S)
        except CheckpointError as error:
            # The exception of the training loop is the one to see; this one goes with it.
            value.add_note(f"closing the checkpointer failed too: {error}")

    def _usable(self) -> None:
        if self._closed:
            raise UnusableRequest("this Checkpointer is closed; make a new one")
        if os.getpid() != self._pid:
            raise UnusableRequest("this Checkpointer belongs to the parent process; a forked child cannot use it")
        if self._broken is not None:
            raise RestoreIncomplete(f"the live state was left incomplete by a failed restore: {self._broken}")


_open: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def _end_all() -> None:
    """At exit: finish what is in flight of checkpointers that nobody closed; threads that still train hear of it."""
    for checkpointer in list(_open):
        checkpointer._closed = True
        checkpointer._ending.end(CLOSE_AT_EXIT_S)


# As early as the interpreter lets us: the pools of threads that drains need refuse work once `atexit` begins.
getattr(threading, "_register_atexit", atexit.register)(_end_all)
