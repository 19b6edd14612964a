"""A root that is another directory on every host holds no whole checkpoint; nothing may be committed there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.checkpointer import Checkpointer
from ckptengine.errors import SaveFailed
from ckptengine.operations.saving import one_place

from .simulated import QuickOps, on_ranks


def save_under(roots: list[Path], **options: Any) -> None:
    def work(rank: int) -> None:
        rows = torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2].clone()
        state = {"w": ce.Sharded(rows, (4, 2), offset=(2 * rank, 0))}
        with Checkpointer(
            state, roots[rank], random=False, rank_timeout_s=20, file_ops=QuickOps(), **options
        ) as saving:
            saving.save(1).result()

    on_ranks(len(roots), work)


@pytest.mark.parametrize("keep", [None, ce.Keep(last=1)])
def test_a_root_that_ranks_do_not_share_is_refused(
    keep: ce.Keep | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_place, "VISIBLE_S", 0.2)
    with pytest.raises(SaveFailed, match=r"ranks \[1\].*not one directory for all ranks"):
        save_under([tmp_path / "here", tmp_path / "there"], keep=keep)
    assert ce.steps(tmp_path / "here") == ce.steps(tmp_path / "there") == []
    assert not list(tmp_path.glob("*/step-*/rank-*"))


def test_files_that_show_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    whole = one_place._is_whole

    def late(*of: Any) -> bool:
        seen.append(time.monotonic())
        return seen[-1] > seen[0] + 0.3 and whole(*of)

    monkeypatch.setattr(one_place, "_is_whole", late)
    save_under([tmp_path, tmp_path])
    assert ce.steps(tmp_path) == [1]
    assert len(seen) > 2
    with ce.open(tmp_path) as checkpoint:
        checkpoint.verify()
