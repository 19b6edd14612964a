"""Memory that several names share takes one content: where the checkpoint has two, that is told, not lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import StateMismatch


def tied() -> dict[str, torch.Tensor]:
    memory = torch.zeros(3)
    return {"a": memory, "b": memory}


def test_different_contents_for_shared_memory_are_refused(tmp_path: Path) -> None:
    ce.save({"a": torch.arange(3.0), "b": torch.arange(3.0) + 9}, tmp_path, 1)
    live = tied()
    with pytest.raises(StateMismatch, match="b: shares its memory with a here, and differs"):
        ce.load(live, tmp_path)
    assert torch.equal(live["a"], torch.zeros(3))
    assert ce.load(live, tmp_path, strict=False) == 1
    assert torch.equal(live["b"], torch.arange(3.0))


def test_equal_contents_and_ties_of_the_checkpoint_fit(tmp_path: Path) -> None:
    ce.save({"a": torch.arange(3.0), "b": torch.arange(3.0)}, tmp_path / "equal", 1)
    both = torch.arange(3.0)
    ce.save({"a": both, "b": both}, tmp_path / "tied", 1)
    for root in ("equal", "tied"):
        live = tied()
        ce.load(live, tmp_path / root)
        assert torch.equal(live["b"], torch.arange(3.0))
