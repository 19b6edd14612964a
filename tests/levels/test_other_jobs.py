"""What another job left on a tier in front of a root is neither restored nor mixed in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import Conflict

from .jobs import folder_of, is_exactly, run_steps, state_of


def train(root: Path, tiers: list[str | Path], upto: int) -> int:
    """Go on to step ``upto``; what was restored, after a look whether it is exact."""
    state = state_of(0)
    places = [ce.Tier(path) for path in tiers]
    with ce.Checkpointer(state, root, tiers=places, interval=ce.Every(steps=1), random=False) as checkpointer:
        start = checkpointer.restore() or 0
        assert is_exactly(state, start)
        run_steps(checkpointer, state, range(start + 1, upto + 1))
    return start


def test_a_new_job_does_not_go_on_from_another_s_tier(tmp_path: Path) -> None:
    train(tmp_path / "first", [tmp_path / "disk"], 3)
    with pytest.raises(Conflict, match=r"disk holds step 3 of run .* another job left it there") as refused:
        train(tmp_path / "second", [tmp_path / "disk"], 3)
    assert str(tmp_path / "disk") in str(refused.value)
    assert train(tmp_path / "second", [tmp_path / "other"], 2) == 0
    assert train(tmp_path / "first", [tmp_path / "disk"], 4) == 3, "nothing was changed, and the lock was let go"


def test_checkpoints_of_the_same_number_are_told_apart(tmp_path: Path) -> None:
    """Step, attempt and save are equal: by these alone one would be taken for the other."""
    for name in ("a", "b"):
        train(tmp_path / name, [tmp_path / f"{name}-disk"], 3)
    with pytest.raises(Conflict):
        train(tmp_path / "a", [tmp_path / "b-disk"], 4)
    assert train(tmp_path / "a", [tmp_path / "a-disk"], 4) == 3


def test_host_memory_and_second_tiers_too(tmp_path: Path, memory: str) -> None:
    train(tmp_path / "first", [memory, tmp_path / "disk"], 3)
    with pytest.raises(Conflict, match=folder_of(memory).name):
        train(tmp_path / "second", [memory, tmp_path / "new"], 3)
    with pytest.raises(Conflict, match="disk"):
        train(tmp_path / "second", [tmp_path / "new", tmp_path / "disk"], 3)
    shutil.rmtree(folder_of(memory))
    assert train(tmp_path / "second", [memory, tmp_path / "new"], 1) == 0


def test_what_was_copied_together_with_its_root_is_known(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3)
    for name in ("root", "disk"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-moved")
    assert train(tmp_path / "root-moved", [tmp_path / "disk-moved"], 4) == 3


def test_a_root_whose_records_are_damaged_is_no_reason_to_refuse(tmp_path: Path) -> None:
    train(tmp_path / "root", [tmp_path / "disk"], 3)
    for path in (tmp_path / "root" / "attempts").glob("*.0.json"):
        path.write_bytes(b"rubbish")
    assert train(tmp_path / "root", [tmp_path / "disk"], 4) == 3
