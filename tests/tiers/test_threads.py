"""The pool of threads behind tiers: it does what it should, and holds up no exit."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from ckptengine.tiers.threads import DaemonThreads


def test_it_runs_what_it_is_given_on_few_threads() -> None:
    pool = DaemonThreads(3, "test-pool")
    seen: set[str] = set()

    def work(number: int) -> int:
        seen.add(threading.current_thread().name)
        time.sleep(0.001)
        return number * number

    futures = [pool.submit(work, number) for number in range(50)]
    assert [future.result(10) for future in futures] == [number * number for number in range(50)]
    assert 1 <= len(seen) <= 3
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(10)
    assert pool.submit(work, 7).result(10) == 49, "an error ends no thread"
    pool.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-pool")]
    with pytest.raises(RuntimeError):
        pool.submit(work, 1)


def test_one_thread_is_enough_for_one_after_the_other() -> None:
    pool = DaemonThreads(8, "test-one")
    for _ in range(20):
        pool.submit(lambda: None).result(10)
        time.sleep(0.005)
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("test-one")]) <= 2
    pool.shutdown()


def test_shutdown_drops_what_has_not_begun() -> None:
    pool, go = DaemonThreads(1, "test-drop"), threading.Event()
    first = pool.submit(go.wait, 10)
    rest = [pool.submit(lambda: 1) for _ in range(5)]
    pool.shutdown(wait=False, cancel_futures=True)
    go.set()
    assert first.result(10)
    for future in rest:
        with pytest.raises(CancelledError):
            future.result(10)
    pool.shutdown(cancel_futures=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-drop")]


HANGS = """
import asyncio, threading
from ckptengine.tiers.loop import IoLoop
loop = IoLoop()
loop.submit(asyncio.to_thread(threading.Event().wait))
loop.run(asyncio.to_thread(int))
loop.close(0.2)
"""


def test_a_call_that_never_returns_holds_up_no_exit() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
