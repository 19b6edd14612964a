"""Without the native part: the same checkpoints, either way round."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine import native

from .tree import ROOT

PROGRAM = """
import sys
import torch
import ckptengine as ce
from ckptengine import native

root, verb = sys.argv[1:]
assert not native.available() and native.backend() == "portable"
state = {"a": torch.arange(5000.0).reshape(50, 100), "b": torch.arange(7, dtype=torch.int16), "note": {"x": [1, None]}}
if verb == "save":
    with ce.Checkpointer(state, root) as checkpointer:
        checkpointer.save(3)
else:
    wanted = {name: value.clone() for name, value in state.items() if name != "note"}
    for name in wanted:
        state[name].zero_()
    state["note"] = None
    assert ce.load(state, root) == 3
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert state["note"] == {"x": [1, None]}
    ce.open(root).verify()
"""


def portable(root: Path, verb: str) -> None:
    environment = {**os.environ, "CKPTENGINE_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(root), verb]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def make_state() -> dict[str, object]:
    a, b = torch.arange(5000.0).reshape(50, 100), torch.arange(7, dtype=torch.int16)
    return {"a": a, "b": b, "note": {"x": [1, None]}}


def test_portable_saves_and_restores(tmp_path: Path) -> None:
    portable(tmp_path / "run", "save")
    portable(tmp_path / "run", "load")


@pytest.mark.skipif(not native.available(), reason="the native part is not built")
def test_portable_and_native_read_each_other(tmp_path: Path) -> None:
    ce.save(make_state(), tmp_path / "native", 3)
    portable(tmp_path / "native", "load")
    portable(tmp_path / "portable", "save")
    found = make_state() | {"a": torch.zeros(50, 100)}
    assert ce.load(found, tmp_path / "portable") == 3
    assert torch.equal(found["a"], make_state()["a"])  # type: ignore[arg-type]
    assert ce.open(tmp_path / "native").digest("a") == ce.open(tmp_path / "portable").digest("a")
