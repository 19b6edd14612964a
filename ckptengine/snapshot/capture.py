"""One save's capture on one rank: what must be safe before an update, and proof that nothing changed underneath."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.optim.optimizer import Optimizer

from ckptengine.errors import CheckpointError, Stalled, TornCapture
from ckptengine.snapshot.port import WriteJob

GUARD_SAMPLES = 2
"""Granules per extent that the mutation guard digests again; paranoid mode takes all."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A live tensor that an extent reads, and what the tripwires compare.

    ``owners``: ids of the optimizers that write it.
    """

    extent: int
    name: str
    tensor: torch.Tensor
    version: int
    address: int
    storage: int
    owners: frozenset[int]


class Capture:
    """Registered extents of live tensors, and when each may change again.

    The truth of the mutation guard is the epoch: an optimizer that touches a storage which has not been released tears
    the capture.  Version counters, addresses and sampled bytes are extra tripwires.
    """

    def __init__(self, job: WriteJob, lazy: Sequence[Lazy], *, paranoid: bool = False) -> None:
        self._job = job
        self._paranoid = paranoid
        self._lock = threading.Lock()
        self._waiting = {item.extent: item for item in lazy}
        self._by_storage: dict[int, list[int]] = {}
        for item in lazy:
            self._by_storage.setdefault(item.storage, []).append(item.extent)
        self._error: CheckpointError | None = None

    @property
    def error(self) -> CheckpointError | None:
        """Why the capture is torn, None while it is good."""
        return self._error

    @property
    def released(self) -> bool:
        """Whether every live tensor may change again."""
        return not self._waiting

    def fence(self, optimizer: Optimizer | None, timeout_s: float | None) -> None:
        """Block until what ``optimizer`` (None: everything) overwrites, and what no optimizer owns, is captured.

        Past ``timeout_s`` the save is given up rather than training stopped.  Raises nothing: the save's handle tells.
        """
        extents = self._wanted(optimizer)
        if not extents:
            return
        if not self._job.wait_captured(extents, timeout_s):
            self._job.cancel()
            self._tear(Stalled(f"the save was given up: it would have blocked training for more than {timeout_s:g} s"))
        self._release(extents)

    def after_update(self, optimizer: Optimizer) -> None:
        """An update has happened: whatever of it was not released is torn."""
        if self._waiting:
            torn = [self._waiting[e].name for e in self._touched(optimizer) if e in self._waiting]
            if torn:
                self._tear(
                    TornCapture(
                        f"{type(optimizer).__name__} changed {_some(torn)} while it was being captured; the fence did "
                        "not run before that update: call Checkpointer.fence() in front of it"
                    )
                )

    def cancel(self) -> None:
        """Stop capturing; nothing reads live memory when it returns."""
        self._job.cancel()

    def finish(self) -> None:
        """Wait until everything is captured and checked; called in the background."""
        self._job.wait_captured(None)
        with self._lock:
            extents = list(self._waiting)
        self._release(extents)

    def _wanted(self, optimizer: Optimizer | None) -> list[int]:
        with self._lock:
            if not self._waiting:
                return []
            if optimizer is None:
                return list(self._waiting)
            touched = set(self._touched(optimizer))
            return [e for e, item in self._waiting.items() if e in touched or not item.owners]

    def _touched(self, optimizer: Optimizer) -> Iterable[int]:
        """Extents whose storage belongs to a parameter or state of ``optimizer``."""
        key = id(optimizer)
        owned = [e for e, item in list(self._waiting.items()) if key in item.owners]
        if owned:
            return owned
        found: list[int] = []
        for tensor in _tensors_of(optimizer):
            found.extend(self._by_storage.get(storage_of(tensor), ()))
        return found

    def _release(self, extents: Sequence[int]) -> None:
        """Run the tripwires over captured extents, once each, and let go of their tensors."""
        with self._lock:
            items = [self._waiting[e] for e in extents if e in self._waiting]
            if not items:
                return
            torn = [
                item.name
                for item in items
                if item.tensor._version != item.version or item.tensor.data_ptr() != item.address
            ]
            if not torn and self._error is None:
                by_extent = {item.extent: item.name for item in items}
                samples = None if self._paranoid else GUARD_SAMPLES
                torn = [by_extent[e] for e in self._job.recheck(list(by_extent), samples)]
            for item in items:
                del self._waiting[item.extent]
        if torn:
            self._tear(
                TornCapture(
                    f"{_some(torn)} changed while being captured; this save is void. Change live tensors only after "
                    "Checkpointer.fence(), which optimizers call by themselves"
                )
            )

    def _tear(self, error: CheckpointError) -> None:
        if self._error is None:
            self._error = error


def storage_of(tensor: torch.Tensor) -> int:
    """Address of the storage behind a tensor, the local one of a DTensor."""
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.untyped_storage().data_ptr())


def _tensors_of(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, dict):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
