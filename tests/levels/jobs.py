"""A state whose every element follows from the step, and where its bytes lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.tiers.memory import SHARED_MEMORY

NUMBER = 40_000


def state_of(step: int) -> dict[str, Any]:
    return {"big": _big(step), "small": torch.tensor([step, -step], dtype=torch.int64), "note": {"step": step}}


def _big(step: int) -> torch.Tensor:
    return torch.arange(NUMBER, dtype=torch.int64) * 1009 + step


def set_state(state: dict[str, Any], step: int) -> None:
    state["big"].copy_(_big(step))
    state["small"].copy_(torch.tensor([step, -step]))
    state["note"]["step"] = step


def is_exactly(state: dict[str, Any], step: int) -> bool:
    wanted = state_of(step)
    return (
        torch.equal(state["big"], wanted["big"])
        and torch.equal(state["small"], wanted["small"])
        and state["note"] == wanted["note"]
    )


def run_steps(checkpointer: ce.Checkpointer, state: dict[str, Any], steps: range) -> list[ce.SaveHandle | None]:
    """Train: one exact change of the state for each step, each followed by the hook."""
    handles = []
    for step in steps:
        checkpointer.fence()
        set_state(state, step)
        handles.append(checkpointer.step(step))
    return handles


def folder_of(url: str) -> Path:
    """The directory behind host memory."""
    return SHARED_MEMORY / f"ckptengine-{os.getuid()}" / url.removeprefix("shm://")


def flip(root: Path, step: int) -> Path:
    """Turn one bit in the middle of a step's rank file."""
    (path,) = (root / f"step-{step:09d}").glob("rank-*.bin")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return path
