"""The deadline after SIGTERM holds for the interpreter's own end too, on every rank, and a cap for the last save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.coordination.alone import Alone
from ckptengine.operations.stopping.stopping import Stopping
from ckptengine.snapshot.engines import engine_for

JOB = """
import os, signal, sys, time, torch
sys.path.insert(0, sys.argv[3])
import ckptengine as ce

class Slow:
    def __del__(self, sleep=time.sleep):
        os.write(1, b"taking apart\\n")
        sleep(60)

kept = Slow() if sys.argv[2] == "slow" else None
with ce.Checkpointer({"t": torch.arange(5)}, sys.argv[1], sigterm_s=4, random=False) as checkpointer:
    os.kill(os.getpid(), signal.SIGTERM)
    checkpointer.step(1)
"""


@pytest.mark.parametrize("kind", ["slow", "quick"])
def test_taking_the_interpreter_apart_is_bounded(tmp_path: Path, kind: str) -> None:
    here = str(Path(__file__).resolve().parents[2])
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(tmp_path), kind, here],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ce.steps(tmp_path) == [1]
    if kind == "quick":
        assert done.returncode == 143, done.stderr
    else:
        assert done.stdout == "taking apart\n", done.stderr
        assert done.returncode == -signal.SIGALRM, "the kernel, as no thread runs any more"
        assert time.monotonic() - began_s < 40


def test_a_rank_that_did_not_get_the_signal_has_the_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []
    monkeypatch.setattr(Stopping, "_give_up", lambda self: ended.append(time.monotonic()))
    stopping = Stopping(Alone(), 0.2)
    try:
        began_s = time.monotonic()
        assert stopping.left_s() == 0.0, "a moment is kept back"
        while not ended and time.monotonic() < began_s + 10:
            time.sleep(0.01)
        assert ended
        assert ended[0] - began_s >= 0.2
    finally:
        stopping.close()


def test_the_cap_of_a_checkpointer_holds_for_the_weights_at_the_end(tmp_path: Path) -> None:
    if engine_for().private or not native.available():
        pytest.skip("the portable engine knows no cap")
    state = {"t": torch.arange(5)}
    with ce.Checkpointer(state, tmp_path, sigterm_s=60, max_bytes_per_s=16_000_000, random=False) as checkpointer:
        weights = checkpointer._weights({"t": torch.zeros(6_000_000)}, tmp_path / "weights")
        began_s = time.monotonic()
        weights.save(1).result(60)
        assert time.monotonic() - began_s > 0.7, "24 MB, of which the first piece goes at once"
        weights.close()
