"""A pool of threads that the end of the process does not wait for.

Python's own joins its threads at exit, so that one call into storage that hangs, as network file systems do, would keep
a job that has failed from ever ending.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Work:
    future: concurrent.futures.Future[Any]
    call: Callable[[], Any]


class DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """At most ``count`` threads, begun as they are needed.  (The base class only because asyncio insists on it.)"""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, name)
        self._count, self._name = count, name
        self._guard = threading.Lock()
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._members: list[threading.Thread] = []
        self._idle = 0
        self._ended = False

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Have ``call`` run on one of the threads.  RuntimeError after `shutdown`."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._guard:
            if self._ended:
                raise RuntimeError("the pool has ended; nothing more can be run on it")
            self._work.put(_Work(future, lambda: call(*args, **kwargs)))
            if self._idle:
                self._idle -= 1
            elif len(self._members) < self._count:
                member = threading.Thread(target=self._serve, name=f"{self._name}_{len(self._members)}", daemon=True)
                self._members.append(member)
                member.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; ``wait`` until what was taken is done, without what ``cancel_futures`` drops."""
        with self._guard:
            self._ended = True
            with contextlib.suppress(queue.Empty):
                while cancel_futures:
                    work = self._work.get_nowait()
                    if work is not None:
                        work.future.cancel()
            for _ in self._members:
                self._work.put(None)
        if wait:
            for member in self._members:
                member.join()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            if work.future.set_running_or_notify_cancel():
                try:
                    work.future.set_result(work.call())
                except BaseException as error:
                    work.future.set_exception(error)
            del work  # nothing of it is to live on while this thread waits
            with self._guard:
                self._idle += 1
