"""A power cut after every file operation: whatever was acknowledged loads bit for bit, and nothing else ever does."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError

from .ops import Fault, FaultyOps
from .powerlog import Event, PowerLog, Survivors, rebuild
from .states import blank, differences, load_exactly, set_state, state_of

WITHIN_S = 60.0


def record(parent: Path, saves: list[int]) -> list[Event]:
    """The operations of a job that saves these steps into a root that is not there yet, acknowledgements marked."""
    log = PowerLog(parent)
    state = state_of(0)
    with ce.Checkpointer(state, parent / "run" / "root", file_ops=log, random=False) as checkpointer:
        for step in saves:
            set_state(state, step)
            checkpointer.save(step).result(WITHIN_S)
            log.mark(f"acknowledged {step}")
    return log.events


def acknowledged(events: list[Event]) -> list[int]:
    return [int(event.name.split()[1]) for event in events if event.name.startswith("acknowledged")]


def check(root: Path, known: list[int], saves: list[int], where: str) -> None:
    """Every acknowledged step is there, nothing that was never saved is, and a new job goes on from the newest."""
    there = ce.steps(root)
    assert set(known) <= set(there) <= set(saves), where
    for step in there:
        try:
            assert load_exactly(root, step) == step, where
        except CheckpointError:
            assert step not in known, f"{where}: step {step} was acknowledged and does not load"
    state = blank()
    with ce.Checkpointer(state, root, random=False) as checkpointer:
        try:
            newest = checkpointer.restore()
        except CheckpointError:
            assert not known, where
            newest = None
        assert newest is None or not differences(state, newest), where
        assert not known or (newest is not None and newest >= max(known)), where
        after = (newest or 0) + 1
        set_state(state, after)
        assert checkpointer.save(after).result(WITHIN_S) == after, where
    assert load_exactly(root) == after, where


@pytest.mark.parametrize("survivors", ["synced", "all", "names", "random"])
def test_a_power_cut_after_every_operation(tmp_path: Path, survivors: Survivors) -> None:
    before = tmp_path / "before"
    before.mkdir()
    saves = [3, 7, 7]
    events = record(before, saves)
    assert acknowledged(events) == saves
    assert {"create", "pwrite", "fsync", "link", "unlink", "mkdir", "fsync_dir"} <= {event.name for event in events}
    for at in range(len(events) + 1):
        after = tmp_path / "after"
        rebuild(events[:at], after, survivors, at)
        where = f"cut after {at} operations (the last: {events[at - 1].name if at else 'none'})"
        check(after / "run" / "root", acknowledged(events[:at]), saves, where)
        shutil.rmtree(after)


def test_the_recording_is_the_real_tree(tmp_path: Path) -> None:
    """The emulation is only worth something when a cut that loses nothing gives exactly the tree that is there."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    events = record(before, [1, 2])
    rebuild(events, after, "all")
    real = {path.relative_to(before): path.read_bytes() for path in before.rglob("*") if path.is_file()}
    real.pop(Path("run/root/.lock"))
    assert real == {path.relative_to(after): path.read_bytes() for path in after.rglob("*") if path.is_file()}


def test_the_emulation_finds_a_writer_that_does_not_flush(tmp_path: Path) -> None:
    """Without the flushes of directories an acknowledged step is lost: the test above can fail."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    events = [event for event in record(before, [1]) if event.name != "fsync_dir"]
    rebuild(events, after, "synced")
    assert not (after / "run").exists()


def test_a_failed_save_whose_removal_is_lost_in_a_power_cut(tmp_path: Path) -> None:
    """The flush behind the manifest's name fails and power goes: the save before is the newest, or this one whole."""
    before = tmp_path / "before"
    before.mkdir()
    log = PowerLog(before)
    gate = FaultyOps()
    for name in ("create", "pwrite", "preallocate", "fsync", "close", "link", "unlink", "mkdir", "rmdir", "fsync_dir"):
        inner = getattr(log, name)
        setattr(gate, name, lambda *args, n=name, call=inner: gate._do(n, lambda: call(*args)))
    state = state_of(1)
    with ce.Checkpointer(state, before / "root", file_ops=gate, random=False, on_failure=ce.Tolerate()) as checkpointer:
        checkpointer.save(1).result(WITHIN_S)
        log.mark("acknowledged 1")
        gate.arm(None)
        set_state(state, 2)
        checkpointer.save(2).result(WITHIN_S)
        log.mark("acknowledged 2")
        total = gate.count
        start = len(log.events)
        set_state(state, 3)
        for at in range(total):
            gate.arm(Fault(at, "late", errno.EIO))
            failed = checkpointer.save(3).exception(WITHIN_S)
            assert failed is not None or not gate.hit  # a folder that is there already saves operations
    events = log.events
    for at in range(start, len(events) + 1, 3):
        for survivors in ("synced", "random"):
            after = tmp_path / "after"
            rebuild(events[:at], after, survivors, at)  # type: ignore[arg-type]
            check(after / "root", [1, 2], [1, 2, 3], f"cut after {at}")
            shutil.rmtree(after)
