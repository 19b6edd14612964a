"""States whose every element says which tensor, element and step it is, so that a wrong byte anywhere shows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce


def state_of(step: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The state at ``step``: small tensors of several dtypes, a large one, values; with ``world`` > 1 one sharded."""
    base = step * 2_003
    wide = torch.arange(12_000, dtype=torch.int64) + base
    state: dict[str, Any] = {
        "wide": wide,
        "half": ((torch.arange(700) + base) % 2039).to(torch.bfloat16),
        "bits": (torch.arange(33) + step) % 3 == 0,
        "scalar": torch.tensor(base, dtype=torch.int32),
        "empty": torch.empty(0, 3),
        "at": {"step": step, "note": f"step {step}"},
    }
    state["tied"] = state["half"]
    if world > 1:
        rows = 40 // world
        grid = torch.arange(40 * 25, dtype=torch.int32).reshape(40, 25) + base
        part = grid[rank * rows : (rank + 1) * rows].clone()
        state["grid"] = ce.Sharded(part, (40, 25), offset=(rank * rows, 0))
    return state


def blank(rank: int = 0, world: int = 1) -> dict[str, Any]:
    """A live state to restore into, with none of the right bytes."""
    return state_of(987_654, rank, world)


def set_state(state: dict[str, Any], step: int, rank: int = 0, world: int = 1) -> None:
    """Turn a live state into that of ``step``, in place."""
    for name, value in state_of(step, rank, world).items():
        if isinstance(value, torch.Tensor):
            state[name].copy_(value)
        elif isinstance(value, ce.Sharded):
            state[name].tensor.copy_(value.tensor)
        else:
            state[name] = value


def differences(state: dict[str, Any], step: int, rank: int = 0, world: int = 1) -> list[str]:
    """Names of leaves that are not bit-identical to those of ``step``."""
    wrong = []
    for name, value in state_of(step, rank, world).items():
        found = state[name]
        if isinstance(value, ce.Sharded):
            value, found = value.tensor, found.tensor
        if isinstance(value, torch.Tensor):
            same = isinstance(found, torch.Tensor) and value.dtype == found.dtype and torch.equal(value, found)
        else:
            same = bool(value == found)
        if not same:
            wrong.append(name)
    return wrong


def load_exactly(root: Path, step: int | None = None) -> int:
    """Load from ``root`` and prove that every leaf is that of the step it says; the step."""
    state = blank()
    found = ce.load(state, root, step)
    wrong = differences(state, found)
    assert not wrong, f"step {found} was loaded with wrong bytes in {wrong}"
    return found


def engine_threads() -> list[str]:
    """Threads of ours that are alive, without the native engine's (they are not Python's and serve the process)."""
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("ckptengine"))


def debris(root: Path) -> list[str]:
    """Files beneath a root that no manifest names and that are no attempt records or locks; empty step folders too."""
    found = []
    for folder in sorted(root.glob("step-*")):
        there = folder.glob("manifest-*.json")
        manifests = {path.name.removeprefix("manifest-").removesuffix(".json") for path in there}
        names = sorted(path.name for path in folder.iterdir())
        if not names:
            found.append(f"{folder.name}/")
        for name in names:
            save = name.partition("-")[2].removesuffix(".bin").partition("-")[2]
            if not name.startswith("manifest-") and save not in manifests:
                found.append(f"{folder.name}/{name}")
    return found + sorted(path.name for path in (root / "attempts").glob(".*"))
