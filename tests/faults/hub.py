"""Several ranks in one process: a coordinator over a dict, so that faults of ranks can be swept quickly."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from ckptengine import checkpointer as facade
from ckptengine.coordination.port import Coordinator
from ckptengine.errors import CoordinationFailed, RankTimeout
from ckptengine.state import collect, restore_values, tensors

T = TypeVar("T")


class Hub:
    """The messages of one job, and which of its ranks are cut off."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.messages: dict[str, bytes] = {}
        self.changed = threading.Condition()
        self.dead: set[int] = set()
        self.stopped: set[int] = set()

    def stop(self, rank: int) -> None:
        """Nothing that this rank does reaches anybody, or returns, until `go_on`: as after SIGSTOP."""
        with self.changed:
            self.stopped.add(rank)

    def go_on(self) -> None:
        with self.changed:
            self.stopped.clear()
            self.changed.notify_all()

    def kill(self, rank: int) -> None:
        with self.changed:
            self.dead.add(rank)
            self.changed.notify_all()


class HubPort:
    """See `Coordinator`."""

    members = None

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank, self.world = hub, rank, hub.world

    def _alive(self) -> None:
        self.hub.changed.wait_for(lambda: self.rank not in self.hub.stopped)
        if self.rank in self.hub.dead:
            raise CoordinationFailed(f"rank {self.rank} is dead")

    def put(self, key: str, data: bytes) -> None:
        with self.hub.changed:
            self._alive()
            self.hub.messages[key] = data
            self.hub.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> bytes:
        deadline_s = time.monotonic() + timeout_s
        with self.hub.changed:
            self._alive()
            if not self.hub.changed.wait_for(lambda: key in self.hub.messages, deadline_s - time.monotonic()):
                raise RankTimeout(f"rank {self.rank} waited {timeout_s:g} s for {key!r}")
            self._alive()
            return self.hub.messages[key]

    def delete(self, key: str) -> None:
        with self.hub.changed:
            self._alive()
            self.hub.messages.pop(key, None)

    def close(self) -> None:
        return None


class Ranks:
    """Calls on all ranks at once, each on its own thread."""

    def __init__(self, world: int) -> None:
        self.hub = Hub(world)
        self.world = world
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(world, "rank")

    def choose(self, group: object, timeout_s: float) -> Coordinator:
        """In place of the facade's own choice."""
        return HubPort(self.hub, self._local.rank)

    def current(self) -> int:
        """The rank whose thread this is."""
        return int(self._local.rank)

    def all(self, call: Callable[[int], T], timeout_s: float = 20.0) -> list[T]:
        """``call(rank)`` on every rank; the results in order, or the first error."""
        return [future.result(timeout_s) for future in [self._pool.submit(self._as, rank, call) for rank in self.ranks]]

    @property
    def ranks(self) -> range:
        return range(self.world)

    def _as(self, rank: int, call: Callable[[int], T]) -> T:
        self._local.rank = rank
        return call(rank)

    def close(self) -> None:
        self._pool.shutdown()


@contextlib.contextmanager
def ranks_in_process(world: int, patch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    ranks = Ranks(world)
    patch.setattr(facade, "choose", ranks.choose)
    for module in (tensors, collect, restore_values):
        patch.setattr(module, "global_rank", ranks.current)
    try:
        yield ranks
    finally:
        patch.undo()
        ranks.close()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returned, or the error that it raised."""
    try:
        return call()
    except Exception as error:
        return error


@contextlib.contextmanager
def ranks_on_own_machines(world: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """`ranks_in_process`, each on a machine of its own."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    number = itertools.count()
    monkeypatch.setattr("ckptengine.operations.levels.places.host", lambda: f"node-{next(number)}")
    with ranks_in_process(world, monkeypatch) as found:
        yield found
