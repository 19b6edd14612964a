"""One save's capture on one rank: what must be safe before an update, and proof that nothing changed underneath."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.optimizer import Optimizer

from ckptengine.errors import CheckpointError, SaveFailed, Stalled, TornCapture
from ckptengine.snapshot.port import Progress, WriteJob
from ckptengine.snapshot.witness import Witnesses
from ckptengine.state.laid import local_of
from ckptengine.state.leaves import TensorLeaf

Places = npt.NDArray[np.int64]

GUARD_SAMPLES = 2
"""Granules per extent that the mutation guard digests again; paranoid mode takes all."""


class LazySet:
    """The extents that read live tensors, and what the tripwires compare; the same for every save of a structure."""

    def __init__(self, extents: Sequence[int], leaves: Sequence[TensorLeaf], rows: Mapping[str, int]) -> None:
        """``rows``: where the registration keeps what it noted of a leaf."""
        self.extents = np.array(extents, np.int64)
        self.leaves = leaves
        self.rows = np.array([rows[leaf.name] for leaf in leaves], np.int64)
        self.tensors = [leaf.tensor for leaf in leaves]
        self.addresses = [leaf.tensor.data_ptr() for leaf in leaves]
        self.by_storage: dict[int, list[int]] = {}
        self.by_owner: dict[int, list[int]] = {}
        self.unowned: list[int] = []
        for place, leaf in enumerate(leaves):
            self.by_storage.setdefault(storage_of(leaf.tensor), []).append(place)
            for owner in leaf.owners:
                self.by_owner.setdefault(owner, []).append(place)
            if not leaf.owners:
                self.unowned.append(place)
        self._members: dict[int, tuple[list[int], list[int]]] = {}

    def touched(self, optimizer: Optimizer) -> list[int]:
        """Places of the leaves whose storage belongs to a parameter or state of ``optimizer``.

        Its groups are looked at: another one's parameter may have come to it since the walk.
        """
        owned = self.by_owner.get(id(optimizer))
        if owned is None:
            return self._on(_tensors_of(optimizer))
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        ids = list(map(id, members))
        known = self._members.get(id(optimizer))
        if known is None or known[0] != ids:
            known = ids, list(dict.fromkeys((*owned, *self._on(members))))
            self._members[id(optimizer)] = known
        return known[1]

    def _on(self, tensors: Iterable[torch.Tensor]) -> list[int]:
        found: list[int] = []
        for tensor in tensors:
            found.extend(self.by_storage.get(storage_of(tensor), ()))
        return found


class Capture:
    """Registered extents of live tensors, and when each may change again.

    The truth of the mutation guard is the epoch: an optimizer that touches a storage which has not been released tears
    the capture.  Version counters, addresses, witnesses and sampled bytes are extra tripwires.
    """

    def __init__(
        self,
        job: WriteJob,
        lazy: LazySet,
        versions: Sequence[int],
        witnesses: Witnesses,
        *,
        paranoid: bool = False,
    ) -> None:
        self._job = job
        self._lazy = lazy
        self._versions = versions
        self._witnesses = witnesses
        self._paranoid = paranoid
        self._lock = threading.Lock()
        self._waiting = np.ones(len(lazy.extents), np.bool_)
        self._released = not len(lazy.extents)
        self._error: CheckpointError | None = None

    @property
    def error(self) -> CheckpointError | None:
        """Why the capture is torn, None while it is good."""
        return self._error

    @property
    def released(self) -> bool:
        """Whether every live tensor may change again."""
        return self._released

    def progress(self) -> Progress:
        """The counters of its job."""
        return self._job.progress()

    def fence(self, optimizer: Optimizer | None, timeout_s: float | None) -> None:
        """Block until what ``optimizer`` (None: everything) overwrites, and what no optimizer owns, is captured.

        Past ``timeout_s`` the save is given up rather than training stopped.  Raises nothing: the save's handle tells.
        """
        places = self._wanted(optimizer)
        if not len(places):
            return
        try:
            if not self._job.wait_captured(self._lazy.extents[places].tolist(), timeout_s):
                told = f"the save was given up: it would have blocked training for more than {timeout_s:g} s"
                self._tear(Stalled(told))  # first, so that who waits in the background hears why it has stopped
                self._job.stop()  # what is at it writes what is void; waiting for that would block training further
            self._release(places)
        except Exception as error:  # a device that fails, say
            failed = SaveFailed(f"the capture failed: {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._tear(failed)
            with self._lock:
                self._let_go(places)

    def after_update(self, optimizer: Optimizer) -> None:
        """An update has happened: whatever of it was not released is torn."""
        if not self._released:
            torn = [self._lazy.leaves[place].name for place in self._lazy.touched(optimizer) if self._waiting[place]]
            if torn:
                self._tear(
                    TornCapture(
                        f"{type(optimizer).__name__} changed {_some(torn)} while it was being captured; the fence did "
                        "not run before that update: call Checkpointer.fence() in front of it, and save on another "
                        "thread only while no update is under way"
                    )
                )

    def cancel(self) -> None:
        """Stop capturing; nothing reads live memory when it returns."""
        self._job.cancel()

    def finish(self) -> None:
        """Wait until everything is captured and checked; called in the background."""
        self._job.wait_captured(None)
        self._release(np.flatnonzero(self._waiting))

    def _wanted(self, optimizer: Optimizer | None) -> Places:
        if self._released:
            return np.zeros(0, np.int64)
        if optimizer is None:
            return np.flatnonzero(self._waiting)
        wanted = np.zeros(len(self._waiting), np.bool_)
        wanted[self._lazy.touched(optimizer)] = True
        wanted[self._lazy.unowned] = True
        return np.flatnonzero(wanted & self._waiting)

    def _release(self, places: Places) -> None:
        """Run the tripwires over captured leaves, once each, and let go of them."""
        with self._lock:
            places = places[self._waiting[places]]
            torn = [self._lazy.leaves[place].name for place in self._changed(places)] if self._error is None else []
            if torn:  # first: a Ctrl-C in between must not lose it
                self._tear(
                    TornCapture(
                        f"{_some(torn)} changed while being captured; this save is void. Change live tensors only "
                        "after Checkpointer.fence(), which optimizers call by themselves"
                    )
                )
            self._let_go(places)

    def _changed(self, places: Places) -> list[int]:
        """Those of some places that are not as they were at registration, or not as they were captured."""
        lazy, rows, chosen = self._lazy, self._lazy.rows[places], places.tolist()
        tensors = [lazy.tensors[place] for place in chosen]
        versions, noted = [tensor._version for tensor in tensors], [self._versions[row] for row in rows.tolist()]
        addresses, known = [tensor.data_ptr() for tensor in tensors], [lazy.addresses[place] for place in chosen]
        if versions != noted or addresses != known:  # whole lists: a hundred thousand tensors are looked at
            now, then = zip(versions, addresses, strict=True), zip(noted, known, strict=True)
            return [place for place, is_, was in zip(chosen, now, then, strict=True) if is_ != was]
        # Everything lies where it did, and so may be looked at.
        belied = places[np.isin(rows, self._witnesses.belied(rows))]
        if len(belied):
            return list(dict.fromkeys(belied.tolist()))
        extents = lazy.extents[places]
        changed = self._job.recheck(extents.tolist(), None if self._paranoid else GUARD_SAMPLES)
        torn: list[int] = places[np.isin(extents, changed)].tolist()
        return torn

    def _let_go(self, places: Places) -> None:
        self._waiting[places] = False
        self._released = not self._waiting.any()

    def _tear(self, error: CheckpointError) -> None:
        if self._error is None:
            self._error = error


def storage_of(tensor: torch.Tensor) -> int:
    """Address of the storage behind a tensor: the local one of a DTensor, what a wrapper holds."""
    return int(local_of(tensor).untyped_storage().data_ptr())


def _tensors_of(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
