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

assert not native.available() and native.backend() == "portable"
saved, *roots = sys.argv[1:]


def make_state():
    a, b = torch.arange(5000.0).reshape(50, 100), torch.arange(7, dtype=torch.int16)
    return {"a": a, "b": b, "note": {"x": [1, None]}}


with ce.Checkpointer(make_state(), saved) as checkpointer:
    checkpointer.save(3)
for root in (saved, *roots):
    state = {"a": torch.zeros(50, 100), "b": torch.zeros(7, dtype=torch.int16), "note": None}
    assert ce.load(state, root) == 3
    wanted = make_state()
    assert torch.equal(state["a"], wanted["a"]) and torch.equal(state["b"], wanted["b"])
    assert state["note"] == wanted["note"]
    ce.open(root).verify()
"""


def portable(saved: Path, *roots: Path) -> None:
    """Save to ``saved`` and load it and ``roots`` in a process without the native part."""
    environment = {**os.environ, "CKPTENGINE_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(saved), *map(str, roots)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_missing_native_part_is_said_once() -> None:
    program = (
        "import sys; sys.modules['ckptengine._native'] = None\n"
        "from ckptengine import native\n"
        "assert native.crc64(b'123456789') == 0xAE8B14860A799888\n"
        "print(native.backend())\n"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "portable\n"
    assert len(done.stderr.splitlines()) == 1
    assert "no native library" in done.stderr
    assert "slower" in done.stderr


@pytest.mark.skipif(native.available(), reason="covered together with the native part")
def test_portable_saves_and_restores(tmp_path: Path) -> None:
    portable(tmp_path / "run")


@pytest.mark.skipif(not native.available(), reason="the native part is not built")
def test_portable_and_native_read_each_other(tmp_path: Path) -> None:
    state = {"a": torch.arange(5000.0).reshape(50, 100), "b": torch.arange(7, dtype=torch.int16)}
    ce.save({**state, "note": {"x": [1, None]}}, tmp_path / "native", 3)
    portable(tmp_path / "portable", tmp_path / "native")
    found = {"a": torch.zeros(50, 100), "b": torch.zeros(7, dtype=torch.int16), "note": None}
    assert ce.load(found, tmp_path / "portable") == 3
    assert found["note"] == {"x": [1, None]}
    assert torch.equal(found["a"], state["a"])  # type: ignore[arg-type]
    assert ce.open(tmp_path / "native").digest("a") == ce.open(tmp_path / "portable").digest("a")
