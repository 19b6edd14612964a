"""The last save when there is not time for all of it: weights before moments.

Where the time until the deadline is less than a whole save is expected to take, the state is first captured where saves
land, as always; then the state without its optimizers is saved whole, as a checkpoint of its own, in a root of its own
beside the steps (``weights-only-step-...``); then the whole step goes on its way.  What is there of weights alone is
never a step of the root: who wants it names it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any, Protocol

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.errors import CheckpointError
from ckptengine.operations.levels.onward import Onward
from ckptengine.operations.levels.tally import Tally
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.operations.stopping.stopping import Stopping
from ckptengine.state.flatten import flatten
from ckptengine.state.leaves import FlatState
from ckptengine.store import names
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import Tier, open_tier

log = logging.getLogger("ckptengine")

_ASSUMED_BYTES_PER_S = 50e6
"""What a rank is taken to bring to the root as long as no save of this job has come there."""
_WORTH = 0.9
"""Weights that are more of the state than this are not saved apart."""
_LANDING_SHARE = 0.5
"""How much of the time that is left the landing of the whole state may take before weights are turned to."""
_POLL_S = 0.02


class SavesWeights(Protocol):
    """A checkpointer of the weights alone."""

    def save(self, step: int) -> SaveHandle: ...

    def close(self, timeout_s: float | None = None) -> None: ...


Opener = Callable[[Any, str], SavesWeights]
"""Makes a checkpointer of a state under a root."""


class Pace:
    """How long saves of this job have taken to become durable: the longest of the last few.  Thread-safe enough: one
    thread ends saves."""

    def __init__(self) -> None:
        self._took_s: list[float] = []

    def ended(self, handle: SaveHandle) -> None:
        """A save has ended."""
        if handle.stage == "durable":
            self._took_s = [*self._took_s[-7:], handle.counters["durable_s"]]

    def expected_s(self, size_bytes: int) -> float:
        """Seconds that a save of ``size_bytes``, all that this rank holds, is expected to take to the root."""
        return max(self._took_s) if self._took_s else size_bytes / _ASSUMED_BYTES_PER_S


def without_optimizers(state: Any) -> Any:
    """The nested state less whatever has parameter groups; the same objects under the same names."""
    if isinstance(state, dict):
        return {key: without_optimizers(value) for key, value in state.items() if not _is_optimizer(value)}
    if type(state) in (list, tuple):
        # None in their place: what comes behind keeps its number, and so its name.
        return type(state)(None if _is_optimizer(value) else without_optimizers(value) for value in state)
    return state


def weights_root(root: str, step: int) -> str:
    """Where the weights of ``step`` go: a root of its own, so that nothing takes it for a step of ``root``."""
    return f"{root.rstrip('/')}/{names.weights_dir(step)}"


class LastSave:
    """Brings one step to safety before a deadline.  Called by all ranks alike, once."""

    def __init__(
        self, deadline_s: float, port: Coordinator, onward: Onward | None, tally: Tally, root: str, timeout_s: float
    ) -> None:
        """Watches for SIGTERM from now on.  ``deadline_s``: from the signal to the end of the process."""
        self.stopping = Stopping(port, deadline_s)
        self._pace = Pace()
        tally.on_end(self._pace.ended)
        self._port, self._root, self._timeout_s = port, root, timeout_s
        self._onward = None if onward is None or onward.is_single else onward

    def run(self, state: Any, step: int, save: Callable[[], SaveHandle], open_weights: Opener) -> None:
        """``save`` starts the save of the whole state.  Returns when it is durable, has failed, or time is over."""
        apart = self._choose(state)
        if apart is None:
            self.stopping.finish(save())
            return
        where = weights_root(self._root, step)
        log.warning(
            "SIGTERM: %.1f s are left and the whole state may take longer: the weights of step %d go first, to %s",
            *(self.stopping.left_s(), step, Tier(where).label),
            extra={"ckptengine": {"step": step, "target": Tier(where).label}},
        )
        handle = self._land(save) if self._onward is not None else None
        try:
            safe = self._save_weights(apart, step, where, open_weights)
        finally:
            if self._onward is not None:
                self._onward.release()
        handle = handle or save()
        self.stopping.finish(handle)
        if handle.stage == "durable":
            self._forget(where)
        elif safe:
            log.warning(
                "SIGTERM: of step %d the weights are safe, the optimizers' state is not: load them with "
                "ckptengine.load(state, %r, strict=False)",
                *(step, Tier(where).label),
                extra={"ckptengine": {"step": step, "target": Tier(where).label}},
            )

    def _choose(self, state: Any) -> Any | None:
        """The state without optimizers where that is to go first, as rank 0 says; None: all at once."""
        apart = without_optimizers(state)
        choice = False
        if self._port.rank == 0:
            whole, part = _bytes(flatten(state, random=False)), _bytes(flatten(apart, random=False))
            choice = part < _WORTH * whole and self._pace.expected_s(whole) > self.stopping.left_s()
            publish(self._port, "stop/weights", choice)
        elif self._port.world > 1:
            choice = bool(receive(self._port, "stop/weights", self._timeout_s))
        return apart if choice else None

    def _land(self, save: Callable[[], SaveHandle]) -> SaveHandle:
        """The whole state where saves land, and no further yet."""
        assert self._onward is not None
        landed = self._onward.hold()
        handle = save()
        until_s = self.stopping.left_s() * (1 - _LANDING_SHARE)
        while not landed.wait(_POLL_S) and not handle.done() and self.stopping.left_s() > until_s:
            pass
        return handle

    def _save_weights(self, apart: Any, step: int, where: str, open_weights: Opener) -> bool:
        try:
            weights = open_weights(apart, where)
            try:
                safe = weights.save(step).wait("durable", self.stopping.left_s())
            finally:
                weights.close(self.stopping.left_s())
        except CheckpointError as error:
            log.error("the weights of step %d could not be saved by themselves: %s", step, error)
            return False
        return safe

    def _forget(self, where: str) -> None:
        """The whole step is durable: the weights alone are worth nothing any more."""
        folder = Tier(where).local_path
        if self._port.rank != 0:
            return
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        loop = IoLoop()
        try:
            tier = BlockingTier(open_tier(where, loop), loop, timeout_s=self.stopping.left_s())
            for entry in tier.entries():
                tier.delete(entry.name)
            tier.close()
        except (CheckpointError, TimeoutError) as error:
            log.warning("%s is not needed any more and could not be removed: %s", Tier(where).label, error)
        finally:
            loop.close()


def _is_optimizer(value: object) -> bool:
    return hasattr(value, "param_groups")


def _bytes(flat: FlatState) -> int:
    return sum(leaf.local_bytes for leaf in flat.tensors)
