"""The asyncio loop on its own thread, and the synchronous face of a tier."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from ckptengine.errors import StorageFailed, UnusableRequest
from ckptengine.tiers.cancelling import cancel_all
from ckptengine.tiers.port import Abilities, Bytes, Entry, Spare, TierPort, nothing
from ckptengine.tiers.threads import DaemonThreads

T = TypeVar("T")


class IoLoop:
    """One event loop on one daemon thread, with a bounded pool of threads for blocking file operations.

    It starts at the first use and ends with `close`; a tier must be used on the loop on which it was first used.
    """

    def __init__(self, *, threads: int = 16, name: str = "ckptengine-io") -> None:
        self._threads = threads
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start ``work`` on the loop; its result or error arrives in the future."""
        try:
            loop = self._running()
        except UnusableRequest:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run ``work`` on the loop and wait for it.

        `StorageFailed` when that takes longer than ``timeout_s``, or when the loop is closed meanwhile.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise UnusableRequest("a blocking call on the I/O loop's own thread waits for itself; await it instead")
        future = self.submit(work)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise StorageFailed(f"an I/O operation did not finish within {timeout_s} s; it was given up") from None
        except concurrent.futures.CancelledError:
            raise StorageFailed("an I/O operation was given up, as what it belongs to was closed") from None

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what is still running, and join the thread; bounded by ``timeout_s``."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None and thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout_s)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise UnusableRequest("the I/O loop is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        pool = DaemonThreads(self._threads, self._name)
        loop.set_default_executor(pool)
        try:
            loop.run_forever()
            loop.run_until_complete(cancel_all())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            loop.close()


class BlockingTier:
    """Any tier for callers that are not on the loop: the same calls, each waiting for its answer."""

    def __init__(self, tier: TierPort, loop: IoLoop, *, timeout_s: float | None = None) -> None:
        self.tier = tier
        self._loop = loop
        self._timeout_s = timeout_s

    def within(self, timeout_s: float) -> BlockingTier:
        """The same tier, each call given up after ``timeout_s``."""
        return BlockingTier(self.tier, self._loop, timeout_s=timeout_s)

    @property
    def label(self) -> str:
        return self.tier.label

    @property
    def abilities(self) -> Abilities:
        return self.tier.abilities

    def entries(self, prefix: str = "") -> list[Entry]:
        return self._loop.run(self.tier.entries(prefix), self._timeout_s)

    def stat(self, name: str) -> Entry | None:
        return self._loop.run(self.tier.stat(name), self._timeout_s)

    def read(self, name: str, offset: int, size_bytes: int) -> bytes:
        return self._loop.run(self.tier.read(name, offset, size_bytes), self._timeout_s)

    def read_into(self, name: str, offset: int, view: memoryview) -> None:
        self._loop.run(self.tier.read_into(name, offset, view), self._timeout_s)

    def create(self, name: str, data: Bytes) -> None:
        self._loop.run(self.tier.create(name, data), self._timeout_s)

    def delete(self, name: str) -> None:
        self._loop.run(self.tier.delete(name), self._timeout_s)

    def sweep(self, prefix: str, spare: Spare = nothing) -> list[str]:
        return self._loop.run(self.tier.sweep(prefix, spare), self._timeout_s)

    def close(self) -> None:
        self._loop.run(self.tier.close(), self._timeout_s)
