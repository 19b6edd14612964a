"""Coordination over a torch key-value store of our own.

Not the process group's default store: a blocking wait on that one would hold its lock against the training thread.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import time
import uuid
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, missing from its module's __all__

from ckptengine.errors import CoordinationFailed, RankTimeout

_POLL_S = 0.002
_POLL_MAX_S = 0.05
_LINGER_S = 10.0

log = logging.getLogger("ckptengine")


class TorchStore:
    """See `Coordinator`.  Built by all ranks of ``group`` together (one broadcast, at construction only)."""

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float = 300.0) -> None:
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)
        ranks = dist.get_process_group_ranks(group)
        self.members = None if ranks == list(range(self.world)) else tuple(ranks)
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._pid = os.getpid()
        self._closed = False
        self._prefix = uuid.uuid4().hex
        offer: list[Any] = [None]
        if self.rank == 0:
            # Port 0 lets the system choose; bound on all interfaces because other nodes connect.
            self._store = self._connect(_address(), 0)
            offer = [(_address(), self._store.port, self._prefix)]
        source = dist.get_global_rank(group, 0) if group is not None else 0
        dist.broadcast_object_list(offer, src=source, group=group)
        if self.rank != 0:
            host, port, self._prefix = offer[0]
            self._store = self._connect(host, port)

    def _connect(self, host: str, port: int) -> TCPStore:
        """Rank 0 serves the store, the others reach it."""
        serves = self.rank == 0
        return TCPStore(host, port, self.world, is_master=serves, timeout=self._timeout, wait_for_workers=False)

    def put(self, key: str, data: bytes) -> None:
        try:
            self._store.set(f"{self._prefix}/{key}", data)  # type: ignore[arg-type]  # takes bytes as well
        except RuntimeError as error:
            raise CoordinationFailed(f"rank {self.rank} cannot reach rank 0 to tell {key}: {error}") from error

    def get(self, key: str, timeout_s: float) -> bytes:
        # Polled, because a blocking wait keeps the client's lock and other threads of this rank use it too.
        name = f"{self._prefix}/{key}"
        deadline_s = time.monotonic() + timeout_s
        pause_s = _POLL_S
        while True:
            try:
                if self._store.check([name]):
                    return bytes(self._store.get(name))
            except RuntimeError as error:
                raise CoordinationFailed(f"rank {self.rank} lost rank 0 while waiting for {key}: {error}") from error
            if time.monotonic() > deadline_s:
                raise RankTimeout(
                    f"rank {self.rank} waited {timeout_s:g} s for {key!r}: "
                    "a rank died, hangs, or did not make the same call"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    def has(self, key: str) -> bool:
        try:
            return bool(self._store.check([f"{self._prefix}/{key}"]))
        except RuntimeError as error:
            raise CoordinationFailed(f"rank {self.rank} lost rank 0 while looking for {key}: {error}") from error

    def delete(self, key: str) -> None:
        try:
            self._store.delete_key(f"{self._prefix}/{key}")
        except RuntimeError as error:
            raise CoordinationFailed(f"rank {self.rank} lost rank 0: {error}") from error

    def close(self) -> None:
        """Let go of the store; rank 0, which serves it, waits up to `_LINGER_S` until the others have too."""
        if os.getpid() != self._pid or self._closed:
            return  # a forked child must not tear down its parent's store
        self._closed = True
        try:
            if self.rank != 0:
                self.put(f"bye/{self.rank}", b"")
            else:
                deadline_s = time.monotonic() + _LINGER_S
                for rank in range(1, self.world):
                    self.get(f"bye/{rank}", max(0.0, deadline_s - time.monotonic()))
        except CoordinationFailed:
            log.info("rank %d leaves without having heard of all others", self.rank)
        del self._store


def _address() -> str:
    """The name under which other ranks reach this host."""
    return os.environ.get("MASTER_ADDR") or socket.gethostname()
