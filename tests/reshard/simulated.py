"""Many ranks in one process: real checkpointers, each on its own thread, that talk through a dictionary."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ckptengine import checkpointer as module
from ckptengine.checkpointer import Checkpointer
from ckptengine.coordination.alone import Alone
from ckptengine.errors import RankTimeout
from ckptengine.state import collect, restore_values, tensors
from ckptengine.store.files import FileOps

T = TypeVar("T")


class Board:
    """What the ranks of one simulated job tell each other."""

    def __init__(self) -> None:
        self.notes: dict[str, bytes] = {}
        self.changed = threading.Condition()


class Seat:
    """One rank's `Coordinator`."""

    members = None

    def __init__(self, board: Board, rank: int, world: int) -> None:
        self._board, self.rank, self.world = board, rank, world

    def put(self, key: str, data: bytes) -> None:
        with self._board.changed:
            self._board.notes[key] = data
            self._board.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> bytes:
        with self._board.changed:
            if not self._board.changed.wait_for(lambda: key in self._board.notes, timeout_s):
                raise RankTimeout(f"rank {self.rank} waited {timeout_s:g} s for {key}")
            return self._board.notes[key]

    def delete(self, key: str) -> None:
        with self._board.changed:
            self._board.notes.pop(key, None)

    def close(self) -> None: ...


class QuickOps(FileOps):
    """No flushes: these tests are about which bytes go where."""

    def fsync(self, fd: int) -> None: ...

    def fsync_dir(self, path: Path) -> None: ...


_here = threading.local()


def _seat() -> Seat | Alone:
    return getattr(_here, "seat", None) or Alone()


@contextlib.contextmanager
def simulated_ranks() -> Iterator[None]:
    """Checkpointers made inside take their rank from the thread that makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", lambda group, timeout_s: _seat())
        for one in (collect, restore_values, tensors):
            patch.setattr(one, "global_rank", lambda: _seat().rank)
        yield


def on_ranks(world: int, work: Callable[[int], T]) -> list[T]:
    """``work(rank)`` on all ranks at once; raises what the lowest failing rank raised."""
    board = Board()

    def one(rank: int) -> T:
        _here.seat = Seat(board, rank, world) if world > 1 else Alone()
        try:
            return work(rank)
        finally:
            del _here.seat

    with simulated_ranks(), ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
        return [future.result() for future in futures]


def save_all(states: Sequence[Any], root: Path, step: int = 1, **options: Any) -> None:
    """Save one state per rank."""
    options.setdefault("file_ops", QuickOps())

    def work(rank: int) -> None:
        with Checkpointer(states[rank], root, random=False, rank_timeout_s=20, **options) as checkpointer:
            checkpointer.save(step).wait()

    on_ranks(len(states), work)


def restore_all(states: Sequence[Any], root: Path, **options: Any) -> list[int | None]:
    """Restore every rank's state in place; the step that each found."""
    names = options.pop("names", None)
    strict = options.pop("strict", True)

    def work(rank: int) -> int | None:
        with Checkpointer(states[rank], root, random=False, rank_timeout_s=20, **options) as checkpointer:
            return checkpointer.restore(names=names, strict=strict)

    return on_ranks(len(states), work)
