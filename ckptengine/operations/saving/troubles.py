"""Failures of background saves, kept until the training loop hears of them as its policy says."""

from __future__ import annotations

import threading
import time

from ckptengine.errors import CheckpointError
from ckptengine.operations.saving.handle import SaveHandle
from ckptengine.policy.failure import FailurePolicy, Raise, Tolerate, Trouble


class Troubles:
    """Watches handles.  `surface` is called by the hooks."""

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._guard = threading.Lock()
        self._failed: dict[SaveHandle, CheckpointError] = {}
        self._told: list[CheckpointError] = []
        self._durable_step: int | None = None
        self._durable_s = time.monotonic()
        self._first_step: int | None = None
        self._under_way: list[SaveHandle] = []

    def watch(self, handle: SaveHandle) -> None:
        if self._first_step is None:
            self._first_step = handle.step
        with self._guard:
            self._under_way.append(handle)
        handle.on_done(self._ended)

    def under_way(self) -> list[SaveHandle]:
        """Handles of saves that have not ended, oldest first."""
        with self._guard:
            return list(self._under_way)

    def _ended(self, handle: SaveHandle) -> None:
        error = handle.exception(0)
        with self._guard:
            self._under_way.remove(handle)
            if error is not None:
                self._failed[handle] = error
            elif handle.stage == "durable":
                self._durable_step, self._durable_s = handle.step, time.monotonic()
                if isinstance(self._policy, Tolerate):
                    # What failed before matters no more: there is something newer.
                    self._failed = {one: why for one, why in self._failed.items() if one.step > handle.step}

    def surface(self, step: int | None) -> None:
        """Raise the oldest failure where the policy says so; each failure is judged once, the age at every call.

        A step that is tried again and again counts as one that failed, as far as the age goes.
        """
        with self._guard:
            again = [error for handle in self._under_way if (error := handle.trouble) is not None]
            found = [*self._failed.values(), *(error for error in again if error not in self._told)]
            since = self._durable_step if self._durable_step is not None else self._first_step
            age_steps = 0 if step is None or since is None else max(0, step - since)
            trouble = Trouble(
                attempts=len(found),
                age_steps=age_steps,
                age_s=time.monotonic() - self._durable_s,
                can_retry=False,
            )
            decision = self._policy.decide(trouble)
            if found and isinstance(decision, Raise):
                self._failed, self._told = {}, again
                found[0].add_note(f"raised now because {decision.why}")
                raise found[0]
