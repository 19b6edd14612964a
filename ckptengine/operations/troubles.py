"""Failures of background saves, kept until the training loop hears of them as its policy says."""

from __future__ import annotations

import threading
import time

from ckptengine.errors import CheckpointError
from ckptengine.operations.handle import SaveHandle
from ckptengine.policy.failure import FailurePolicy, Raise, Trouble


class Troubles:
    """Watches handles.  `surface` is called by the hooks."""

    def __init__(self, policy: FailurePolicy) -> None:
        self._policy = policy
        self._guard = threading.Lock()
        self._failed: list[CheckpointError] = []
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
                self._failed.append(error)
            elif handle.stage == "durable":
                self._durable_step, self._durable_s = handle.step, time.monotonic()

    def surface(self, step: int | None) -> None:
        """Raise the oldest failure where the policy says so; each failure is judged once, the age at every call."""
        with self._guard:
            failed = self._failed
            since = self._durable_step if self._durable_step is not None else self._first_step
            age_steps = 0 if step is None or since is None else max(0, step - since)
            trouble = Trouble(
                attempts=len(failed),
                age_steps=age_steps,
                age_s=time.monotonic() - self._durable_s,
                can_retry=False,
            )
            if failed and isinstance(self._policy.decide(trouble), Raise):
                error = failed[0]
                self._failed = []
                raise error
