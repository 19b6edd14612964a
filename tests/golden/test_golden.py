"""Checkpoints written by earlier versions of the format stay readable for ever, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine import native

from .make import HERE, STEPS, state_of

VERSIONS = sorted(path.name for path in HERE.iterdir() if path.is_dir() and path.name.startswith("v"))


def differences(found: dict[str, Any], step: int) -> list[str]:
    wrong = []
    for name, value in state_of(step).items():
        if isinstance(value, torch.Tensor):
            same = found[name].dtype == value.dtype and torch.equal(found[name], value)
        else:
            same = repr(found[name]) == repr(value)
        if not same:
            wrong.append(name)
    return wrong


def test_there_is_one_of_each_version() -> None:
    assert VERSIONS == ["v1"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("step", STEPS)
def test_a_golden_checkpoint_loads(version: str, step: int) -> None:
    state = state_of(0x33)
    assert ce.load(state, HERE / version, step) == step
    assert differences(state, step) == []
    assert state["tied"] is not None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_checkpoint_opens(version: str) -> None:
    root = HERE / version
    assert ce.steps(root) == list(STEPS)
    with ce.open(root) as checkpoint:
        assert checkpoint.step == STEPS[-1]
        assert checkpoint.metrics == {"loss": 0.1}
        checkpoint.verify()
        assert torch.equal(checkpoint.read("wide", (slice(7, 9), 3)), state_of(10)["wide"][7:9, 3])
        assert checkpoint.values()["values"]["step"] == 10


def test_the_bytes_of_the_files_are_those_that_were_written() -> None:
    """Line-ending conversion or an editor must not have touched them."""
    files = [path for path in (HERE / "v1").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".bin", ".json", ".claim"}
    assert sum(path.stat().st_size for path in files) < 200_000
    recorded = Path(HERE / "v1.digests").read_text().split()
    found = [
        f"{path.relative_to(HERE)}={native.digest(path.read_bytes())}" for path in sorted(files) if path.stat().st_size
    ]
    assert found == recorded
