"""A root that is removed or replaced under a live job: what is acknowledged is there, and no two jobs mix."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import Conflict, RootInUse, StorageFailed, Superseded
from ckptengine.store.root import Root

from .states import load_exactly, set_state, state_of
from .test_guard import Held, latch  # noqa: F401

WITHIN_S = 60.0


def test_a_job_whose_root_was_removed_does_not_mix_with_the_next(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = state_of(1)
    with ce.Checkpointer(state, root, on_failure=ce.Tolerate(), random=False) as old:
        for step in (1, 2, 3):
            set_state(state, step)
            old.save(step).result(WITHIN_S)
            old.fence()
        shutil.rmtree(root)
        with ce.Checkpointer(state_of(2), root, random=False) as new:
            new.save(2).result(WITHIN_S)
            for step in (2, 4):
                set_state(state, 77)
                assert isinstance(old.save(step).exception(WITHIN_S), RootInUse)
        assert isinstance(old.save(5).exception(WITHIN_S), Conflict)  # of another run, though nobody is there
    assert ce.steps(root) == [2]
    assert load_exactly(root) == 2


def test_a_removed_root_is_claimed_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    state = state_of(1)
    with ce.Checkpointer(state, root, random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        run = Root(root).history.newest_attempt().run  # type: ignore[union-attr]
        shutil.rmtree(root)
        for step in (2, 3):
            set_state(state, step)
            checkpointer.save(step).result(WITHIN_S)
            checkpointer.fence()
        attempt = Root(root).history.newest_attempt()
        assert attempt is not None
        assert (attempt.number, attempt.run) == (1, run)
        with pytest.raises(RootInUse):
            ce.Checkpointer(state_of(1), root)
    with ce.Checkpointer(state, root, random=False) as after:
        assert after.restore(2) == 2
        assert ce.steps(root) == [2]  # what the one before did beyond is an abandoned line


def test_a_root_that_is_replaced_during_a_save(tmp_path: Path, latch: Held) -> None:  # noqa: F811
    """Copied away in the middle: the name leads to a file that is not whole."""
    root = tmp_path / "root"
    state = state_of(1)
    with ce.Checkpointer(state, root, file_ops=latch, on_failure=ce.Tolerate(), random=False) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        set_state(state, 2)
        latch.shut()
        handle = checkpointer.save(2)
        assert latch.reached.wait(WITHIN_S)
        root.rename(tmp_path / "away")
        shutil.copytree(tmp_path / "away", root)
        latch.open()
        assert isinstance(handle.exception(WITHIN_S), StorageFailed)
        assert ce.steps(root) == [1]
        assert checkpointer.save(3).exception(WITHIN_S) is None
    assert ce.steps(root) == [1, 3]


def test_nothing_is_committed_where_the_claim_is_gone(tmp_path: Path) -> None:
    root = Root(tmp_path)
    attempt = root.claim(None)
    root.check_newest(attempt.number)
    shutil.rmtree(tmp_path / "attempts")
    with pytest.raises(Superseded, match="removed or replaced"):
        root.check_newest(attempt.number)
