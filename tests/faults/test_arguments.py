"""Arguments that are no use are refused in words, and leave nothing behind that refuses the next attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import StateMismatch, UnusableRequest


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"tiers": ["/fast"]}, r"tiers holds '/fast'.*ckptengine\.Tier"),
        ({"tiers": "/fast"}, r"tiers='/fast' is not a list"),
        ({"interval": 50}, r"interval=50 is no interval.*ckptengine\.Every"),
        ({"keep": 3}, r"keep=3 is not ckptengine\.Keep"),
        ({"overlap": "maybe"}, "overlap='maybe'"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"arena_bytes": 5}, "arena_bytes=5"),
        ({"max_bytes_per_s": 0}, "max_bytes_per_s=0"),
    ],
)
def test_a_checkpointer_that_was_refused_leaves_the_root_free(
    arguments: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UnusableRequest, match=told) as refused:
        Checkpointer({"t": torch.zeros(2)}, tmp_path, **arguments)
    with Checkpointer({"t": torch.zeros(2)}, tmp_path, random=False) as checkpointer:
        assert checkpointer.save(1).result() == 1
    assert refused.value  # and with it the frames in which it was refused, as in a notebook


def test_names_that_select_nothing_are_no_damage(tmp_path: Path) -> None:
    state = {"t": torch.arange(3.0)}
    ce.save(state, tmp_path, 1)
    with pytest.raises(StateMismatch, match=r"names=\['nothing'\] selects nothing"):
        ce.load({"t": torch.zeros(3)}, tmp_path, names=["nothing"])
    with Checkpointer(state, tmp_path, random=False) as checkpointer:
        with pytest.raises(StateMismatch, match="selects nothing"):
            checkpointer.restore(names=["nothing"])
        assert checkpointer.restore() == 1
