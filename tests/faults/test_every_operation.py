"""Every file operation of a save fails in every way: named error, nothing lost, nothing left, next save works."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError, SaveFailed

from ..descriptors import open_descriptors
from .ops import Fault, FaultyOps, Kind
from .states import blank, debris, differences, engine_threads, load_exactly, set_state, state_of

WITHIN_S = 30.0


def count_operations(root: Path, *, first: bool) -> int:
    """Operations of one save: the first of a job, which claims an attempt, or a later one."""
    ops = FaultyOps()
    state = state_of(1)
    with ce.Checkpointer(state, root, file_ops=ops) as checkpointer:
        if not first:
            checkpointer.save(1).result(WITHIN_S)
        ops.arm(None)
        checkpointer.save(2).result(WITHIN_S)
        return ops.count


CASES: list[tuple[Kind, int, bool]] = [
    ("fail", errno.ENOSPC, False),
    ("fail", errno.EIO, True),
    ("late", errno.EIO, False),
    ("tear", errno.EROFS, False),
    ("fail", errno.EMFILE, True),
    ("short", 0, True),
]


@pytest.mark.parametrize(
    ("kind", "error", "sticky", "first"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES[1:3]],
    ids=lambda value: str(value),
)
def test_a_fault_at_every_operation(tmp_path: Path, kind: Kind, error: int, sticky: bool, first: bool) -> None:
    total = count_operations(tmp_path / "count", first=first)
    assert total > 10
    before_descriptors, before_threads = open_descriptors(), engine_threads()
    for at in range(total):
        root = tmp_path / f"root{at}"
        ce.save(state_of(1), root, 1)
        state = state_of(1)
        ops = FaultyOps()
        checkpointer = ce.Checkpointer(state, root, file_ops=ops, random=False)
        acknowledged = [1]
        step = 2
        if not first:
            set_state(state, step)
            checkpointer.save(step).result(WITHIN_S)
            acknowledged.append(step)
            step += 1
        set_state(state, step)
        ops.arm(Fault(at, kind, error, sticky))
        handle = checkpointer.save(step)
        failed = handle.exception(WITHIN_S)
        hit = ops.hit
        where = f"operation {at} ({hit})"
        if failed is None:
            acknowledged.append(step)
        else:
            assert kind != "short", f"{where}: a short write is continued, not failed: {failed}"
            assert isinstance(failed, SaveFailed), where
            assert errno.errorcode[error] in str(failed), f"{where}: the error does not name its cause: {failed}"
            assert str(tmp_path) in str(failed), where
        ops.arm(None)
        for known in acknowledged:
            assert load_exactly(root, known) == known
        newest = load_exactly(root)
        assert newest == acknowledged[-1] or (failed is not None and newest == step), where
        # The next save, of the same step and of another one.
        if failed is not None:
            with pytest.raises(SaveFailed):
                checkpointer.step(step)
        assert checkpointer.save(step).result(WITHIN_S) == step, where
        set_state(state, step + 1)
        checkpointer.save(step + 1).result(WITHIN_S)
        checkpointer.close()
        assert load_exactly(root) == step + 1
        assert load_exactly(root, step) == step
        if not sticky:
            left = debris(root)
            removal_refused = hit in ("unlink", "rmdir", "create")  # a create that was done, not reported
            assert not left or removal_refused, f"{where} left {left}"
    assert engine_threads() == before_threads
    assert open_descriptors() == before_descriptors


def test_a_fault_is_not_retried_into_success(tmp_path: Path) -> None:
    """One refused flush of the rank file fails the save, though the next flush would succeed."""
    ops = FaultyOps()
    with ce.Checkpointer(state_of(1), tmp_path, file_ops=ops) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        ops.arm(None)
        checkpointer.save(2).result(WITHIN_S)
        flushes = [number for number, name in enumerate(ops.log) if name in ("fsync", "fsync_dir")]
        for step, at in enumerate(flushes, 3):
            ops.arm(Fault(at, "fail", errno.EIO))
            assert isinstance(checkpointer.save(step).exception(WITHIN_S), SaveFailed)
            with pytest.raises(SaveFailed):
                checkpointer.step(step)
            assert step not in ce.steps(tmp_path)


def test_many_failures_leave_nothing(tmp_path: Path) -> None:
    """Descriptors, threads and files are flat over many failing saves of one checkpointer."""
    ops = FaultyOps()
    state = state_of(1)
    with ce.Checkpointer(state, tmp_path, file_ops=ops, on_failure=ce.Tolerate()) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        ops.arm(None)
        checkpointer.save(1).result(WITHIN_S)
        total = ops.count
        descriptors, threads = open_descriptors(), threading.active_count()
        for cycle in range(3 * total):
            ops.arm(Fault(cycle % total, "fail", errno.ENOSPC))
            handle = checkpointer.save(2 + cycle)
            assert isinstance(handle.exception(WITHIN_S), CheckpointError) or ops.hit in ("unlink", "rmdir")
        ops.arm(None)
        assert open_descriptors() == descriptors
        assert threading.active_count() == threads
        checkpointer.save(1000).result(WITHIN_S)
    restored = blank()
    with ce.Checkpointer(restored, tmp_path) as checkpointer:
        assert checkpointer.restore() == 1000
    assert differences(restored, 1) == []
