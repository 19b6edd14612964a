"""Which attempt this job saves as, and which commits it builds on.  Rank 0 only; the others are told."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.store import names
from ckptengine.store.files import make_dirs
from ckptengine.store.history import Attempt
from ckptengine.store.lock import RootLock
from ckptengine.store.root import Root

log = logging.getLogger("ckptengine")


class Claims:
    """Holds the root's lock and claims attempts: the first at the first save, a new one when history is left behind.

    ``linear``: saves continue one training run, so that a first save at step s without a restore leaves steps beyond s
    behind.  A one-shot save adds to whatever there is.  ``announce``: told the number of each claimed attempt before it
    is used; where that raises, the attempt is not used.  ``rests_at``: the root behind the tiers, where there are some.
    """

    def __init__(
        self,
        root: Root,
        run: str | None,
        *,
        linear: bool,
        announce: Callable[[int], None] | None = None,
        rests_at: str = "",
    ) -> None:
        self._root, self._run, self._linear, self._announce = root, run, linear, announce
        self._rests_at = rests_at
        self._guard = threading.Lock()
        self._attempt: Attempt | None = None
        self._base: int | None = None
        make_dirs(root.ops, root.path, root.mode)
        self._lock = RootLock(root.path / names.LOCK)

    def require_run(self) -> None:
        """Raise `Conflict` where the user names the run and what lies here is of another."""
        if self._run is not None:
            with contextlib.suppress(Damaged, UnreadableFormat):  # which restoring or saving has more to say about
                self._root.require_run(self._run)

    def restored(self, step: int) -> None:
        """The job goes on from ``step``: what came after it is an abandoned line from now on."""
        with self._guard:
            self._base = step
            self._attempt = None
            line = self._root.history.line()
            if line and max(line) > step:
                self._attempt = self._claim(step)

    def current(self, step: int) -> Attempt:
        """The attempt for a save of ``step``."""
        with self._guard:
            if not self._lock.stands:
                self._begin_again()
            if self._attempt is None:
                upto = self._base
                if upto is None and self._linear:
                    upto = step
                    self._tell_of_what_is_left(step)
                self._attempt = self._claim(upto)
            return self._attempt

    def _tell_of_what_is_left(self, step: int) -> None:
        """A job that restored nothing and begins in front of what is there may have forgotten to."""
        left = [known for known in self._root.history.line() if known > step]
        if left:
            log.warning(
                "%s: this job restored nothing and saves step %d: steps beyond it, up to %d, are an abandoned line of "
                "history now, which `keep` and prune remove; to go on from them, restore() first",
                self._root.path,
                step,
                left[-1],
            )

    def _claim(self, upto: int | None) -> Attempt:
        attempt = self._root.claim(self._run, upto=upto, rests_at=self._rests_at)
        if self._announce is not None:
            self._announce(attempt.number)
        self._run = attempt.run
        return attempt

    def _begin_again(self) -> None:
        """The root was removed or replaced: what is there now may be another job's.  Raises `RootInUse` if it is."""
        make_dirs(self._root.ops, self._root.path, self._root.mode)
        lock = RootLock(self._root.path / names.LOCK)
        self._lock.release()
        self._lock, self._attempt, self._base = lock, None, None

    def close(self) -> None:
        self._lock.release()
