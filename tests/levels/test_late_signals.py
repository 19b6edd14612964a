"""SIGTERM where no hook comes any more: in native code, after the last step, while closing; and in forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.operations.stopping.wakeup import Wakeup

REPOSITORY = Path(__file__).resolve().parents[2]
CAP = 100_000
"""Bytes per second at which a step of the job takes about three seconds to the root."""

JOB = f"""
import hashlib, logging, multiprocessing, os, signal, sys, threading, time
sys.path.insert(0, {str(REPOSITORY)!r})
import ckptengine as ce
from tests.levels.jobs import set_state, state_of

def soon():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
root, disk, moment, deadline_s = sys.argv[1:]
state = state_of(0)
slow = ce.Tier(disk + "-2", max_bytes_per_s={CAP} if moment == "closing" else None)
with ce.Checkpointer(
    state, root, tiers=[ce.Tier(disk), slow], random=False, sigterm_s=float(deadline_s)
) as checkpointer:
    set_state(state, 1)
    handle = checkpointer.save(1)
    handle.wait("committed")
    if moment == "native":
        handle.result()
        soon()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which no line of Python runs here
    elif moment == "after":
        handle.result()
        os.kill(os.getpid(), signal.SIGTERM)
    elif moment == "closing":
        soon()
    elif moment == "child":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        began_s = time.monotonic()
        child.terminate()
        child.join(30)
        print("child", child.exitcode, time.monotonic() - began_s < 10, flush=True)
    print("end of the loop", flush=True)
print("behind", flush=True)
"""


def run(tmp_path: Path, moment: str, deadline_s: float) -> tuple[int, str, str]:
    """Status, what it said, and its log."""
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(tmp_path / "root"), str(tmp_path / "disk"), moment, str(deadline_s)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def test_the_deadline_holds_where_the_main_thread_is_in_native_code(tmp_path: Path) -> None:
    status, said, errors = run(tmp_path, "native", 2)
    assert status == 143, errors
    assert "end of the loop" not in said
    assert "the deadline of 2 s after SIGTERM has passed" in errors
    assert ce.steps(tmp_path / "root") == [1]


def test_a_signal_behind_the_last_step_ends_the_process_when_it_closes(tmp_path: Path) -> None:
    status, said, errors = run(tmp_path, "after", 60)
    assert status == 143, errors
    assert "end of the loop" in said
    assert "behind" not in said
    assert ce.steps(tmp_path / "root") == [1]


@pytest.mark.parametrize(("deadline_s", "arrives"), [(60, True), (2, False)])
def test_closing_goes_on_as_long_as_the_deadline_allows(tmp_path: Path, deadline_s: float, arrives: bool) -> None:
    status, said, errors = run(tmp_path, "closing", deadline_s)
    assert status == 143, errors
    assert "behind" not in said
    assert "Traceback" not in errors
    assert ce.steps(tmp_path / "root") == ([1] if arrives else [])
    assert ce.steps(tmp_path / "disk") == [1], "what does not get there stays for the next job"


def test_forked_children_end_as_they_would_without_us(tmp_path: Path) -> None:
    status, said, errors = run(tmp_path, "child", 30)
    assert status == 0, errors
    assert said == f"child {-signal.SIGTERM} True\nend of the loop\nbehind\n", "and the parent goes on"


@pytest.fixture
def heard() -> Iterator[threading.Event]:
    """Set when SIGUSR1 has come, whose handler does nothing."""
    former = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    event = threading.Event()
    wakeup = Wakeup(signal.SIGUSR1, event.set)
    yield event
    wakeup.close()
    signal.signal(signal.SIGUSR1, former)


def test_whoever_waited_for_signals_before_still_hears_of_them() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    before = signal.set_wakeup_fd(writing)
    event = threading.Event()
    try:
        wakeup = Wakeup(signal.SIGUSR1, event.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert event.wait(10)
        assert os.read(reading, 8) == bytes([signal.SIGUSR1])
        wakeup.close()
        assert signal.set_wakeup_fd(writing) == writing, "it is back"
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, former)
        os.close(reading)
        os.close(writing)


def test_a_file_that_has_taken_the_number_of_a_closed_pipe_gets_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    former = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    before = signal.set_wakeup_fd(writing)
    event = threading.Event()
    try:
        wakeup = Wakeup(signal.SIGUSR1, event.set)
        with open(tmp_path / "data", "wb") as data:
            os.dup2(data.fileno(), writing)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert event.wait(10)
            wakeup.close()
        assert (tmp_path / "data").read_bytes() == b""
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, former)
        os.close(reading)
        os.close(writing)


def test_other_signals_are_not_taken_for_it(heard: threading.Event) -> None:
    former = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.signal(signal.SIGUSR2, former)
    assert not heard.wait(0.2)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.wait(10)
