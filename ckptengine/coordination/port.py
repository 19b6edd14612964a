"""The port through which ranks act together: small messages under keys, never a collective.

Everything here may be called from background threads; the training thread's process group is not touched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol


class Coordinator(Protocol):
    """Messages between the ranks of one job.  Keys are used once.  Thread-safe."""

    rank: int
    world: int

    @property
    def members(self) -> Sequence[int] | None:
        """The ranks of the world that take part, by their numbers here; None where they are all, in order."""

    def put(self, key: str, data: bytes) -> None:
        """Leave ``data`` under ``key`` for everybody.  Raises `CoordinationFailed`."""

    def get(self, key: str, timeout_s: float) -> bytes:
        """Wait for ``key``.  Raises `RankTimeout` after ``timeout_s``, `CoordinationFailed` when the job is broken."""

    def has(self, key: str) -> bool:
        """Whether somebody has left something under ``key``.  Raises `CoordinationFailed` when the job is broken."""

    def delete(self, key: str) -> None:
        """Forget ``key``; nothing when it is not there."""

    def close(self) -> None: ...


def gather(port: Coordinator, key: str, document: Any, timeout_s: float) -> list[Any] | None:
    """Every rank's JSON ``document`` in rank order on rank 0, None elsewhere."""
    if port.world == 1:
        return [document]
    if port.rank != 0:
        port.put(f"{key}/{port.rank}", json.dumps(document).encode())
        return None
    documents = [document]
    for rank in range(1, port.world):
        documents.append(json.loads(port.get(f"{key}/{rank}", timeout_s)))
        port.delete(f"{key}/{rank}")
    return documents


def publish(port: Coordinator, key: str, document: Any) -> None:
    """Rank 0 tells everybody; read with `receive`."""
    if port.world > 1:
        port.put(key, json.dumps(document).encode())


def receive(port: Coordinator, key: str, timeout_s: float) -> Any:
    """What rank 0 published under ``key``."""
    return json.loads(port.get(key, timeout_s))


def agree(port: Coordinator, key: str, document: Any, timeout_s: float) -> list[Any]:
    """Every rank's ``document`` in rank order, on every rank."""
    gathered = gather(port, f"{key}/in", document, timeout_s)
    if gathered is not None:
        publish(port, f"{key}/out", gathered)
        return gathered
    return list(receive(port, f"{key}/out", timeout_s))
