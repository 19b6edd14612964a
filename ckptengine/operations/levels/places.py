"""Where one checkpointer's checkpoints lie: the root alone, or the tiers in front of it; opened and closed together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptengine.coordination.port import Coordinator, agree, gather
from ckptengine.coordination.relay import error_note, error_of
from ckptengine.errors import CheckpointError, UnusableRequest
from ckptengine.operations.levels.levels import Levels
from ckptengine.operations.levels.nearest import Nearest
from ckptengine.operations.levels.node import host
from ckptengine.operations.levels.one_run import Left
from ckptengine.operations.levels.onward import Onward
from ckptengine.operations.levels.policy_record import PolicyRecord
from ckptengine.operations.levels.tally import Tally
from ckptengine.operations.levels.tiered import TieredFiles
from ckptengine.operations.restore import Restored, RestoreRequest, restore_newest
from ckptengine.operations.save import Saver
from ckptengine.operations.saving.attempts import Claims
from ckptengine.operations.saving.rhythm import Rhythm
from ckptengine.policy.failure import FailurePolicy
from ckptengine.policy.interval import Interval
from ckptengine.policy.keep import Keep
from ckptengine.sources.files import open_files
from ckptengine.store import names
from ckptengine.store.files import FileOps
from ckptengine.store.root import Root
from ckptengine.tiers.spec import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a checkpointer writes: as which ``run`` (None: that of the root), with saves that continue one line of
    training (``linear``), with which permissions (``mode``, None: the umask) and file operations."""

    run: str | None = None
    linear: bool = True
    mode: int | None = None
    file_ops: FileOps | None = None


def check_places(tiers: object, interval: object, keep: object) -> None:
    """Refuse what is no policy before anything is opened, so that no lock is left behind."""
    if isinstance(tiers, (str, bytes)) or not isinstance(tiers, Sequence):
        raise UnusableRequest(f"tiers={tiers!r} is not a list of ckptengine.Tier(...)")
    wrong = next((tier for tier in tiers if not isinstance(tier, Tier)), None)
    if wrong is not None:
        raise UnusableRequest(f"tiers holds {wrong!r}, which is not a ckptengine.Tier(...)")
    if interval is not None and not hasattr(interval, "due"):
        raise UnusableRequest(
            f"interval={interval!r} is no interval: ckptengine.Every(...), ckptengine.AutoInterval(...)"
        )
    if keep is not None and not isinstance(keep, Keep):
        raise UnusableRequest(f"keep={keep!r} is not ckptengine.Keep(...)")


def _require_no_step(directory: Path | None) -> None:
    """Refuse one step of a root: nothing would be found in it, and training would begin anew without a word."""
    if directory is None or not names.STEP_PATTERN.match(directory.name):
        return
    if names.is_step(directory.name, Root(directory).entries()):
        raise UnusableRequest(
            f"{directory} is one step of the root {directory.parent}: give that as the root, and the step to restore()"
        )


class Places:
    """Opened by all ranks together; each raises when any is refused.

    ``levels`` is None for a directory by itself that keeps everything, where saves land on the root and stay.
    ``landing``: where saves are written to, with a history of its own, so that a commit there asks no remote tier.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        tiers: Sequence[Tier],
        interval: Interval | None,
        keep: Keep | None,
        *,
        port: Coordinator,
        policy: FailurePolicy,
        writing: Writing,
        timeout_s: float,
    ) -> None:
        self._port, self._root, self._policy = port, root, policy
        self.levels: Levels | None = None
        self.claims: Claims | None = None
        self._onward: Onward | None = None
        self.interval = interval
        refused: CheckpointError | None = None
        try:
            directory = Tier(root).local_path
            _require_no_step(directory)
            if tiers or keep is not None or directory is None:
                self.levels = Levels(
                    root, tiers, port=port, interval=interval, keep=keep, policy=policy, rank_timeout_s=timeout_s
                )
                directory, self.interval = self.levels.landing, self.levels.interval()
            assert directory is not None
            stays = self.levels is None or self.levels.is_single
            self.landing = Root(directory, writing.file_ops, writing.mode, shared=stays)
            self._all = Root(directory, writing.file_ops, writing.mode)
            if self.levels is not None:
                self._all.history = self.levels.history()
            if port.rank == 0:
                announce = self.levels.announce if self.levels is not None else None
                place = self.levels.place if self.levels is not None else ""
                self.claims = Claims(self._all, writing.run, linear=writing.linear, announce=announce, rests_at=place)
        except CheckpointError as error:
            refused = error
        self._agree("opened", refused, timeout_s)
        self._meet(writing.run, timeout_s)

    def _meet(self, run: str | None, timeout_s: float) -> None:
        """See that what lies here is this job's: rank 0 judges what every rank has found on its tiers."""
        levels, refused = self.levels, None
        has_tiers = levels is not None and not levels.is_single
        if not has_tiers and run is None:
            return
        try:
            if levels is not None and has_tiers:
                self._meet_tiers(levels, run, timeout_s)
            if self.claims is not None:
                self.claims.require_run()
        except CheckpointError as error:
            refused = error
        self._agree("met", refused, timeout_s)

    def _meet_tiers(self, levels: Levels, run: str | None, timeout_s: float) -> None:
        refused: CheckpointError | None = None
        levels.meet(agree(self._port, "meet", host(), timeout_s))
        left: list[Left] = []
        try:
            left = levels.left()
        except CheckpointError as error:
            refused = error
        told = gather(self._port, "left", [dataclasses.asdict(one) for one in left], timeout_s)
        if refused is not None:
            raise refused
        if told is not None:
            levels.require_own([[Left(**one) for one in found] for found in told], run)

    def _agree(self, key: str, refused: CheckpointError | None, timeout_s: float) -> None:
        """Raise on every rank where any is ``refused``; everything is let go of then."""
        answers = agree(self._port, key, None if refused is None else error_note(refused, self._port.rank), timeout_s)
        told = next((answer for answer in answers if answer is not None), None)
        if told is not None:
            self.close()
            self._port.close()
            raise refused or error_of(told)

    @property
    def label(self) -> str:
        """The root in words, without credentials."""
        return self.levels.labels[-1] if self.levels is not None else str(self.landing.path)

    def carry_on(self, saver: Saver, tally: Tally, rhythm: Rhythm) -> Onward | None:
        """Have landed saves carried on, and a record of the policies left whenever a save ends.

        What carries them on; None where saves land on the root and stay.
        """
        recorder = self._recorder(rhythm)
        if recorder is not None:
            tally.on_end(recorder)
        if self.levels is None:
            return None
        self._onward = Onward(self.levels, tally)
        saver.carry_on(self._onward)
        return self._onward

    def _recorder(self, rhythm: Rhythm) -> Callable[[object], None] | None:
        """What leaves a record of the policies in the root when a save has ended, or where saves land if the root is
        remote; None where there is nothing to say."""
        if self._port.rank != 0 or (self.interval is None and self.levels is None):
            return None
        root = Tier(self._root).local_path
        return PolicyRecord(self.landing.path if root is None else root, lambda: self._policies(rhythm))

    def _policies(self, rhythm: Rhythm) -> dict[str, Any]:
        levels, cost = self.levels, rhythm.cost()
        alone = f"{self.label}: every save; keep everything"
        return {
            "interval": rhythm.describe(),
            "on_failure": self._policy.describe(),
            "tiers": [alone] if levels is None else levels.describe(),
            "places": [self.label] if levels is None else levels.labels,
            "cost": None if cost is None else dataclasses.asdict(cost),
        }

    def tally(self) -> Tally:
        """Empty counts of what happens here."""
        if self.levels is None:
            return Tally([], dict)
        return Tally(self.levels.labels, self.levels.pending)

    def restore(self, request: RestoreRequest, number: int, step: int | None) -> Restored | None:
        """Fill a state from the newest step that verifies, or from ``step``; see `restore_newest`.

        Every byte comes from the nearest tier that has it intact.  What an earlier job left in front of the root is
        then carried on.
        """
        levels = self.levels
        if levels is None or levels.is_single:
            files = open_files(self.landing.path)
            try:
                return restore_newest(self._all, files, self._port, request, number, step)
            finally:
                files.close()
        tiers = levels.files()
        nearest = Nearest(tiers, levels.bring_together)
        try:
            restored = restore_newest(self._all, TieredFiles(tiers), self._port, request, number, step, openers=nearest)
            if restored is not None:
                nearest.report(restored.step)
                if self._onward is not None:
                    self._onward.resume(restored.ref)
            return restored
        finally:
            nearest.close()

    def drain(self, timeout_s: float | None) -> bool:
        """Finish carrying within ``timeout_s``; nothing more can land.  Whether all was carried."""
        return self.levels.drain(timeout_s) if self.levels is not None else True

    def close(self) -> None:
        """Give up what is still being carried, and let everything go."""
        self.drain(0.0)
        if self.claims is not None:
            self.claims.close()
        if self.levels is not None:
            self.levels.close(0.0)
