"""Coordination of one process with itself: nothing of torch.distributed is touched."""

from __future__ import annotations

from ckptengine.errors import CoordinationFailed


class Alone:
    """See `Coordinator`."""

    rank = 0
    world = 1
    members = None

    def put(self, key: str, data: bytes) -> None:
        raise CoordinationFailed(f"one process has nobody to tell about {key}")

    def get(self, key: str, timeout_s: float) -> bytes:
        raise CoordinationFailed(f"one process has nobody to hear about {key} from")

    def has(self, key: str) -> bool:
        return False

    def delete(self, key: str) -> None:
        return None

    def close(self) -> None:
        return None
