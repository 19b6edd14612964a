"""Agreement between ranks that each do their part of one piece of background work, such as a drain."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from ckptengine.coordination.port import Coordinator
from ckptengine.errors import CheckpointError, CoordinationFailed, RankTimeout, SaveFailed

_POLL_S = 1.0


class Peers:
    """The ranks behind ``port``.  Waiting ends after ``timeout_s``, and soon after ``stopping`` is set."""

    def __init__(self, port: Coordinator, timeout_s: float, stopping: threading.Event) -> None:
        self._port, self._timeout_s, self._stopping = port, timeout_s, stopping

    def agree(self, key: str, said: str, failure: CheckpointError | None) -> None:
        """Tell and hear how all ranks fared; raise this rank's ``failure``, or say which other ranks failed.

        ``said`` begins the message of the `CoordinationFailed` that is raised where only others failed.
        """
        told = None if failure is None else f"{failure.code}: {failure}"
        try:
            outcomes = self._exchange(key, told)
        except CheckpointError:
            if failure is not None:
                raise failure from None
            raise
        if failure is not None:
            raise failure
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
        if failed:
            first = min(failed)
            raise CoordinationFailed(
                f"{said}: rank {first} failed ({failed[first]})"
                + (f", and {len(failed) - 1} more" if len(failed) > 1 else "")
            )

    def decided(self, key: str, decide: Callable[[], float | None]) -> float | None:
        """What rank 0 decides, on every rank; None where it cannot be heard."""
        if self._port.world == 1:
            return decide()
        if self._port.rank == 0:
            decision = decide()
            self._port.put(key, json.dumps(decision).encode())
            return decision
        try:
            told: float | None = json.loads(self._get(key, time.monotonic() + self._timeout_s))
        except CheckpointError:
            return None  # rank 0 fared otherwise, or is gone; what this rank met stands
        return told

    def _exchange(self, key: str, said: str | None) -> list[str | None]:
        port = self._port
        if port.world == 1:
            return [said]
        deadline_s = time.monotonic() + self._timeout_s
        if port.rank != 0:
            port.put(f"{key}/{port.rank}", json.dumps(said).encode())
            outcomes: list[str | None] = json.loads(self._get(f"{key}/all", deadline_s + 10 * _POLL_S))
            return outcomes
        outcomes = [said]
        for rank in range(1, port.world):
            try:
                outcomes.append(json.loads(self._get(f"{key}/{rank}", deadline_s)))
                port.delete(f"{key}/{rank}")
            except RankTimeout as late:
                outcomes.append(f"{late.code}: {late}")
        port.put(f"{key}/all", json.dumps(outcomes).encode())
        return outcomes

    def _get(self, key: str, deadline_s: float) -> bytes:
        """Wait for ``key`` in short turns, so that closing is not held up by ranks that never answer."""
        while True:
            try:
                return self._port.get(key, _POLL_S)
            except RankTimeout:
                if self._stopping.is_set():
                    raise SaveFailed("this was closed while it waited for other ranks") from None
                if time.monotonic() > deadline_s:
                    raise
