"""The tiers of one checkpointer: where saves land, when and how they are carried on, what each tier keeps.

Saves land on the first tier, which is a directory or host memory.  From there each committed step goes from tier to
tier as far as some tier's interval wants it, the root last.  Decisions that depend on a clock are made by rank 0 and
told to the others; the rest every rank makes alike by itself.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.errors import CheckpointError, UnusableRequest
from ckptengine.operations.drain import Drain, DrainReport, DrainSettings
from ckptengine.operations.draining.commit import Named
from ckptengine.operations.levels.announced import Announced
from ckptengine.operations.levels.held import Held
from ckptengine.operations.levels.keep import apply_keeps
from ckptengine.operations.levels.landing import landing_for
from ckptengine.operations.levels.left_behind import left_behind
from ckptengine.operations.levels.level import Landed, Level, Way
from ckptengine.operations.levels.node import Node, among, node_of
from ckptengine.operations.levels.one_run import Left, left_on, place_of, require_own
from ckptengine.operations.levels.own_tier import commit_on, told_of
from ckptengine.operations.levels.tiered import TieredFiles
from ckptengine.operations.saving.one_place import OnePlace
from ckptengine.policy.failure import FailurePolicy, Retry, Trouble
from ckptengine.policy.interval import Interval, LastSave, Soonest
from ckptengine.policy.keep import Keep
from ckptengine.sources.files import open_files
from ckptengine.sources.port import Files
from ckptengine.store.history import CommitRef, History
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import Tier, open_tier

log = logging.getLogger("ckptengine")

_NEWEST = Keep(last=1)


class Levels:
    """The tiers in front of a root, and the root.  Built by all ranks with the same arguments.

    ``root`` is a directory or a URL.  A URL without a directory or host memory in front of it gets a landing place in
    host memory (on the temporary disk where there is little), which is removed once all is carried on.  ``keep`` and
    ``interval`` are the root's.  ``policy``: whether a hop that failed is tried again.

    Raises `RootInUse` where another live job holds the root, `UnusableRequest` for a root in host memory.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        tiers: Sequence[Tier] = (),
        *,
        port: Coordinator,
        interval: Interval | None = None,
        keep: Keep | None = None,
        policy: FailurePolicy | None = None,
        settings: DrainSettings | None = None,
        rank_timeout_s: float = 300.0,
    ) -> None:
        self._port, self._timeout_s, self._policy = port, rank_timeout_s, policy
        self._settings = settings or DrainSettings()
        specs = [*tiers, Tier(root, interval=interval, keep=keep)]
        if specs[-1].is_memory:
            raise UnusableRequest(
                f"{specs[-1].label} is host memory, where nothing is ever committed; give it as a tier in front of a "
                f"root: tiers=[ckptengine.Tier({specs[-1].label!r})]"
            )
        self._has_own_landing = not (specs[0].is_memory or specs[0].local_path is not None)
        if self._has_own_landing:
            specs.insert(0, landing_for(specs[0]))
        self._loop = IoLoop()
        self._levels: list[Level] = []
        self._held = Held()
        self._retaining = threading.Lock()
        self._number = self._resumed = 0
        self._stranded = False
        try:
            for number, spec in enumerate(specs):
                tier = open_tier(spec, self._loop)
                last = number == len(specs) - 1
                kept = spec.keep if last or spec.keep is not None else _NEWEST
                self._levels.append(Level(spec, tier, BlockingTier(tier, self._loop), kept))
            if port.rank == 0 and len(specs) > 1:
                self._held.take(self._levels[1:])
        except BaseException:
            self.close(0.0)
            raise
        self._node: Node = node_of(port.rank, port.world)
        self._place = OnePlace(self._levels[-1].flat)
        self._announced = Announced([level.flat for level in self._levels])
        for hop, (source, target) in enumerate(zip(self._levels, self._levels[1:], strict=False)):
            cap = target.spec.max_bytes_per_s
            target.drain = Drain(
                source.tier,
                target.tier,
                self._loop,
                port=port,
                settings=self._settings if cap is None else replace(self._settings, max_bytes_per_s=cap),
                again=self._again,
                guard=partial(self._may_commit, target),
                hop=str(hop),  # not by the places, which ranks may call by different paths
            )

    def meet(self, hosts: Sequence[str | None]) -> None:
        """Hear of every rank's machine; see `ckptengine.operations.levels.node`."""
        self._node = among(self._port.rank, hosts)

    def left(self) -> list[Left]:
        """What this rank finds on the tiers in front of the root, where it sees to those of its machine."""
        return left_on([level.flat for level in self._levels[:-1]]) if self._node.leads else []

    def require_own(self, left: Sequence[Sequence[Left]], run: str | None) -> None:
        """Rank 0: raise `Conflict` where what the ranks have ``left`` on their tiers was not saved for this root."""
        require_own(left, [level.flat for level in self._levels], self.place, self.history(), run)

    @property
    def place(self) -> str:
        """The root as attempts record it; empty where no tier lies in front of it."""
        return "" if self.is_single else place_of(self._levels[-1].spec)

    # ---- where

    @property
    def landing(self) -> Path:
        """The directory that saves are written to."""
        first = self._levels[0].tier
        assert isinstance(first, LocalTier)
        return first.root

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._port.rank

    @property
    def is_single(self) -> bool:
        """Whether saves land on the root itself, and nothing is carried anywhere."""
        return len(self._levels) == 1

    @property
    def labels(self) -> list[str]:
        """The tiers in words, nearest first, the root last; without credentials."""
        return [level.spec.label for level in self._levels]

    def is_committed(self, number: int) -> bool:
        """Whether a step on tier ``number`` may be called committed: it survives a power cut, or is on the root."""
        return number == self.last or self._levels[number].is_lasting

    def files(self) -> list[Files]:
        """What lies on each tier, nearest first, for `ckptengine.operations.levels.tiered`."""
        return [
            open_files(level.tier.root) if isinstance(level.tier, LocalTier) else TierFiles(level.flat)
            for level in self._levels
        ]

    def history(self) -> History:
        """The history over all tiers: what the attempts, and the line that counts, are to be taken from."""
        return History(TieredFiles([TierFiles(level.flat) for level in self._levels]))

    @property
    def last(self) -> int:
        """The index of the root."""
        return len(self._levels) - 1

    # ---- when

    def interval(self) -> Interval | None:
        """When the hook must save because some tier wants a checkpoint; None where no tier says when."""
        wanted = [level.spec.interval for level in self._levels if level.spec.interval is not None]
        return None if not wanted else wanted[0] if len(wanted) == 1 else Soonest(tuple(wanted))

    def describe(self) -> list[str]:
        """One line for each tier: its place, when a checkpoint goes there, and what it keeps."""
        lines = []
        for level in self._levels:
            when = "every save" if level.spec.interval is None else level.spec.interval.describe(level.costs.estimate())
            kept = "keep everything" if level.keep is None else level.keep.describe()
            lines.append(f"{level.spec.label}: {when}; {kept}")
        return lines

    # ---- carrying

    def landed(
        self,
        landed: Landed,
        arrived: Callable[[int], None] = lambda number: None,
        tried: Callable[[CheckpointError], None] = lambda error: None,
    ) -> concurrent.futures.Future[int]:
        """Carry a step on as far as it is wanted, in the background; called for each on every rank, in order.

        ``arrived`` is told, on a background thread, of each further tier where the step is committed, ``tried`` of each
        try that failed and that another one follows.
        The future has the index of the last tier that wants it, once the step is committed there and what the tiers
        keep has been applied; `last` is the root's.  Its error is a `CheckpointError`; the step then stays where it has
        come to, and `landed` may be called for it again.
        """
        self._number += 1
        now_s = time.monotonic()
        reach = self._reach(landed, now_s)
        landed = self._told(landed)
        self._commit_on_own(self._levels[landed.at], landed)
        for level in self._levels[landed.at : reach + 1]:
            level.last = LastSave(landed.step, now_s)
        way = Way(landed, reach, now_s, arrived, tried, concurrent.futures.Future())
        self._carry(way, landed.at + 1)
        return way.done

    def resume(
        self,
        ref: CommitRef,
        arrived: Callable[[int], None] = lambda number: None,
        tried: Callable[[CheckpointError], None] = lambda error: None,
        *,
        again: bool = False,
    ) -> concurrent.futures.Future[int] | None:
        """Carry on to the root what an earlier job left on tiers; called by all ranks alike.  None: nothing to do.

        From wherever every file is found, by whichever ranks there are now; only where the root does not have the step
        (``again``: or not every file of it).  Raises `NotFound`, on all ranks, where one is nowhere.
        """
        if self.is_single:
            return None
        self._resumed += 1
        tiers, key = [level.flat for level in self._levels], f"resume/{self._resumed}"
        leads, timeout_s = self._node.leads, self._timeout_s
        left = left_behind(tiers, ref, port=self._port, leads=leads, key=key, timeout_s=timeout_s, again=again)
        return None if left is None else self.landed(left, arrived, tried)

    def bring_together(self, ref: CommitRef) -> bool:
        """Have on the root what nodes have each for themselves, so that all see it; called by all ranks alike.

        Whether there was anything to carry.  Raises like `resume`, and what carrying raises.
        """
        carried = self.resume(ref, again=True) if self._port.world > 1 else None
        if carried is not None:
            carried.result()
        return carried is not None

    def pending(self) -> dict[str, tuple[int, ...]]:
        """Steps on their way, by the tier that they go to."""
        return {level.spec.label: level.drain.pending for level in self._levels if level.drain is not None}

    def progress(self, step: int) -> tuple[int, int]:
        """(bytes of ``step`` that have arrived on the tier that it is on its way to, bytes in all) of this rank."""
        for level in self._levels:
            arrived, size = level.drain.progress(step) if level.drain is not None else (0, 0)
            if size:
                return arrived, size
        return 0, 0

    def announce(self, attempt: int) -> None:
        """Rank 0, right after an attempt was claimed where saves land: claim it on every tier behind too.

        Raises `Superseded` where another job has claimed it there first.
        """
        self._announced.everywhere(attempt)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Finish carrying within ``timeout_s``, give up the rest; nothing more can land.  Whether all was carried."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        finished = True
        for level in self._levels:
            if level.drain is not None:
                left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                finished = level.drain.close(left_s) and finished
        return finished

    def close(self, timeout_s: float | None = None) -> bool:
        """`drain`, then let everything go.  Whether all was carried."""
        finished = self.drain(timeout_s)
        if self._has_own_landing and finished and not self._stranded and len(self._levels) > 1 and self._node.leads:
            # While the root is still held: another job may use this place next.
            shutil.rmtree(self.landing, ignore_errors=True)
        self._held.release()
        for level in self._levels:
            level.flat.close()
        self._loop.close()
        return finished

    # ---- within

    def _reach(self, landed: Landed, now_s: float) -> int:
        """The index of the last tier that wants this step; the same on every rank."""
        if landed.all_the_way:
            return len(self._levels) - 1
        needs_clock = any(level.spec.interval is not None and level.spec.interval.needs_clock for level in self._levels)
        key = f"reach/{self._number}"
        if needs_clock and self._port.rank != 0:
            return int(receive(self._port, key, self._timeout_s))
        reach = 0
        for number, level in enumerate(self._levels):
            interval = level.spec.interval
            if interval is None or interval.due(landed.step, now_s, level.last, level.costs.estimate()):
                reach = number
        if needs_clock:
            publish(self._port, key, reach)
        return reach

    def _carry(self, way: Way, number: int) -> None:
        """Put a step on its way to tier ``number``, and from there on; ends by itself behind the last one."""
        if number > way.reach:
            self._levels[way.reach].has(way.landed)
            self._retain(upto=way.reach)
            way.done.set_result(way.reach)
            return
        landed = way.landed
        level, source = self._levels[number], self._levels[number - 1]
        assert level.drain is not None

        def arrived(carried: concurrent.futures.Future[DrainReport]) -> None:
            error = carried.exception()
            if error is not None:
                self._strand(way, number - 1, error)
                return
            level.costs = level.costs.add(0.0, time.monotonic() - way.started_s)
            self._commit_on_own(level, landed)
            way.arrived(number)
            self._carry(way, number + 1)

        try:
            named = self._named(landed)
            companions = self._announced.of(landed.attempt) if named is not None else ()
            carried = level.drain.submit(
                landed.step, landed.drain_files(number, self.last), named, companions, way.tried
            )
        except CheckpointError as error:
            self._strand(way, number - 1, error)
            return
        finally:
            # Only now, when the drain protects it: retention must not take what is still to be carried on.
            source.has(landed)
        carried.add_done_callback(arrived)

    def _strand(self, way: Way, number: int, error: BaseException) -> None:
        """A step stays on tier ``number``, where it counts as any other."""
        self._stranded = True
        self._retain(upto=number)
        way.done.set_exception(error)

    def _may_commit(self, level: Level, manifest: Named) -> None:
        """Raise where ``manifest`` must not be put on ``level``; a tier of a node's own is not asked to have all."""
        self._held.check(level)
        if self._port.world > 1 and level is self._levels[-1]:
            self._place.require(manifest)

    def _again(self, tries: int) -> float | None:
        """Seconds until a failed hop is tried again, as the policy says; None: not at all."""
        if self._policy is None:
            return None
        decision = self._policy.decide(Trouble(attempts=tries, age_steps=0, age_s=0.0))
        return decision.after_s if isinstance(decision, Retry) else None

    def _named(self, landed: Landed) -> Named | None:
        if self._port.rank != 0 or landed.manifest is None:
            return None
        return Named(landed.manifest_name, landed.manifest)

    def _told(self, landed: Landed) -> Landed:
        """``landed`` with what each rank that sees to its node's own tiers puts there."""
        if self.is_single:
            return landed
        records: Sequence[Named] = ()
        if self._port.rank == 0:
            with contextlib.suppress(CheckpointError):  # told when they are wanted again, to carry the step on
                records = self._announced.of(landed.attempt)
        number, leads = self._number, self._node.leads
        return told_of(landed, records, port=self._port, leads=leads, number=number, timeout_s=self._timeout_s)

    def _commit_on_own(self, level: Level, landed: Landed) -> None:
        if self._port.rank != 0 and level is not self._levels[-1]:
            commit_on(level, landed)

    def _retain(self, upto: int) -> None:
        """Apply each tier's policy as far as the newest step has come."""
        if self._node.leads:
            with self._retaining:
                apply_keeps(self._levels, upto, held=self._held, node=self._node, rank=self._port.rank)
