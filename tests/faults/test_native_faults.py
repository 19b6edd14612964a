"""The native engine's own system calls fail, write short, stall or kill: as under the portable engine."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.errors import SaveFailed

from ..descriptors import open_descriptors
from .states import debris, engine_threads

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")
WITHIN_S = 60.0
COUNT = 3_000_000


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    native.disarm_faults()


def state_of(step: int) -> dict[str, torch.Tensor]:
    return {"big": torch.arange(COUNT, dtype=torch.int32) + step, "small": torch.arange(100) * step}


def assert_holds(root: Path, step: int) -> None:
    state = state_of(0)
    assert ce.load(state, root, step) == step
    for name, value in state_of(step).items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("error", "sticky", "short_bytes"),
    [(errno.ENOSPC, False, -1), (errno.EIO, True, -1), (errno.EROFS, True, -1), (0, False, 5000), (0, True, 65536)],
)
def test_every_write(tmp_path: Path, error: int, sticky: bool, short_bytes: int) -> None:
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, on_failure=ce.Tolerate(), random=False) as checkpointer:
        told = threading.Event()
        checkpointer.save(1).add_done_callback(lambda _: told.set())
        assert told.wait(WITHIN_S)  # by a thread that the first save to end starts
        descriptors, threads = open_descriptors(), engine_threads()
        good, failures = [1], 0
        for number, nth in enumerate((1, 2, 3, 4, 5, 9)):
            step = 10 * (number + 1)
            for name, value in state_of(step).items():
                state[name].copy_(value)
            native.arm_fault("write", nth=nth, error=error, sticky=sticky, short_bytes=short_bytes)
            failed = checkpointer.save(step).exception(WITHIN_S)
            native.disarm_faults()
            if failed is None:
                good.append(step)
            else:
                failures += 1
                assert isinstance(failed, SaveFailed)
                assert os.strerror(error) in str(failed) or errno.errorcode[error] in str(failed)
                assert str(tmp_path) in str(failed)
            checkpointer.save(step + 1).result(WITHIN_S)
            good.append(step + 1)
            for name, value in state_of(step).items():  # what the save after the fault holds
                with ce.open(tmp_path, step + 1) as checkpoint:
                    assert torch.equal(checkpoint.read(name), value)
        assert (failures > 0) == (error != 0)
        assert open_descriptors() == descriptors
        assert engine_threads() == threads
    assert ce.steps(tmp_path) == good
    assert debris(tmp_path) == []
    assert_holds(tmp_path, 1)


def test_a_slow_disk_holds_the_update_back(tmp_path: Path) -> None:
    """Writes that take long: the update waits at the fence, and the checkpoint is the state before it."""
    parameter = torch.nn.Parameter(torch.arange(COUNT, dtype=torch.float32))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    before = parameter.detach().clone()
    with ce.Checkpointer({"p": parameter}, tmp_path, random=False, arena_bytes=8 << 20) as checkpointer:
        native.arm_fault("write", sticky=True, delay_s=0.15)
        handle = checkpointer.save(1)
        parameter.grad = torch.ones(COUNT)
        optimizer.step()
        native.disarm_faults()
        assert handle.result(WITHIN_S) == 1
    assert not torch.equal(parameter.detach(), before)
    with ce.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("p"), before)


KILLED = """
import os, sys, torch, ckptengine as ce
from ckptengine import native
root, nth = sys.argv[1], int(sys.argv[2])
state = {"big": torch.arange(3_000_000, dtype=torch.int32) + 1, "small": torch.arange(100)}
with ce.Checkpointer(state, root, random=False) as checkpointer:
    checkpointer.save(1).result(30)
    state["big"] += 1
    native.arm_fault("write", nth=nth, kill=True)
    checkpointer.save(2).result(30)
    print("survived")
"""


def test_killed_with_a_full_arena(tmp_path: Path) -> None:
    running = []
    for nth in (1, 2):
        command = [sys.executable, "-c", KILLED, str(tmp_path / str(nth)), str(nth)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for nth, process in enumerate(running, 1):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, output
        assert_holds(tmp_path / str(nth), 1)
        assert ce.steps(tmp_path / str(nth)) == [1]
        assert ce.save(state_of(3), tmp_path / str(nth), 3) == 3
        assert_holds(tmp_path / str(nth), 3)
