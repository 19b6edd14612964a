"""The commit machine against a model: saves, saves again, restores, refusals, crashes anywhere, two jobs, in any order.

The model is small: the line of history is a list of (step, content); an acknowledged save adds to it, a restore to an
older step cuts it, a crash or a refused save leaves it as it was, or, where the save was not acknowledged but had
reached its manifest, with that one more.
"""

from __future__ import annotations

import errno
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ckptengine as ce
from ckptengine.errors import CheckpointError, NotFound, SaveFailed

from .memory_folder import memory_folder
from .powerlog import Event, PowerLog, rebuild

WITHIN_S = 60.0
COUNT = 5000


class Crash(PowerLog):
    """Records every operation; from number ``dead_at`` on all are refused, as for a process that is no more."""

    def __init__(self, root: Path) -> None:
        PowerLog.__init__(self, root)
        self.dead_at: int | None = None
        self.refuse_at: int | None = None
        self.number = 0

    def _gate(self) -> None:
        number, self.number = self.number, self.number + 1
        if self.dead_at is not None and number >= self.dead_at:
            raise OSError(errno.EIO, "the process is dead")
        if number == self.refuse_at:
            raise OSError(errno.ENOSPC, "refused")

    def create(self, path: Path, mode: int = 0o666) -> int:
        self._gate()
        return PowerLog.create(self, path, mode)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._gate()
        return PowerLog.pwrite(self, fd, data, offset)

    def preallocate(self, fd: int, nbytes: int) -> None:
        self._gate()
        PowerLog.preallocate(self, fd, nbytes)

    def fsync(self, fd: int) -> None:
        self._gate()
        PowerLog.fsync(self, fd)

    def link(self, source: Path, target: Path) -> None:
        self._gate()
        PowerLog.link(self, source, target)

    def unlink(self, path: Path) -> None:
        self._gate()
        PowerLog.unlink(self, path)

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._gate()
        PowerLog.mkdir(self, path, mode)

    def rmdir(self, path: Path) -> None:
        self._gate()
        PowerLog.rmdir(self, path)

    def fsync_dir(self, path: Path) -> None:
        self._gate()
        PowerLog.fsync_dir(self, path)


class CommitMachine(RuleBasedStateMachine):
    """One root, one job at a time."""

    @initialize()
    def start(self) -> None:
        self.folder = memory_folder()
        self.disk = self.folder.__enter__()
        self.ops = Crash(self.disk)
        self.line: dict[int, int] = {}
        self.maybe: tuple[int, int] | None = None
        self.content = 0
        self.state: dict[str, Any] = {"t": torch.zeros(COUNT, dtype=torch.int64), "v": 0}
        self.job: ce.Checkpointer | None = None
        self.base: int | None = None

    @property
    def root(self) -> Path:
        return self.disk / "root"

    def open_job(self) -> ce.Checkpointer:
        if self.job is None:
            self.job = ce.Checkpointer(self.state, self.root, file_ops=self.ops, random=False, on_failure=ce.Tolerate())
        return self.job

    def change(self) -> None:
        self.content += 1
        self.state["t"].copy_(torch.arange(COUNT) * self.content)
        self.state["v"] = self.content

    def settle(self) -> None:
        """An unacknowledged save may have happened: look which, and believe the root from then on."""
        if self.maybe is None:
            return
        step, content = self.maybe
        if step in ce.steps(self.root):
            state = {"t": torch.zeros(COUNT, dtype=torch.int64), "v": 0}
            ce.load(state, self.root, step)
            if state["v"] == content:
                self.line[step] = content
        self.maybe = None

    # ---- what a job does

    @precondition(lambda self: self.base is not None or not self.line)
    @rule(ahead=st.integers(0, 3))
    def save(self, ahead: int) -> None:
        self.change()
        step = (self.base or 0) + ahead
        assert self.open_job().save(step).result(WITHIN_S) == step
        self.acknowledge(step)

    def acknowledge(self, step: int) -> None:
        self.line[step] = self.content
        self.base = step

    @precondition(lambda self: self.base is not None)
    @rule(ahead=st.integers(0, 2), at=st.integers(0, 30))
    def save_that_is_refused(self, ahead: int, at: int) -> None:
        self.change()
        job = self.open_job()
        step = (self.base or 0) + ahead
        self.ops.refuse_at = self.ops.number + at
        error = job.save(step).exception(WITHIN_S)
        self.ops.refuse_at = None
        if error is None:
            self.acknowledge(step)
        else:
            assert isinstance(error, SaveFailed)
            self.maybe = (step, self.content)
            self.settle()

    @precondition(lambda self: self.base is not None)
    @rule(ahead=st.integers(0, 2), at=st.integers(0, 40), how=st.sampled_from(["all", "synced", "random"]))
    def save_and_crash(self, ahead: int, at: int, how: Any) -> None:
        """The process dies, or power goes, at operation ``at`` of a save; a new one finds what is left."""
        self.change()
        job = self.open_job()
        step = (self.base or 0) + ahead
        self.ops.dead_at = self.ops.number + at
        error = job.save(step).exception(WITHIN_S)
        if error is None:
            self.acknowledge(step)
        else:
            self.maybe = (step, self.content)
        self.end_job()
        after = Path(tempfile.mkdtemp(dir=self.disk.parent))
        rebuild(self.ops.events, after, how, seed=self.ops.number)
        shutil.rmtree(self.disk)
        after.rename(self.disk)
        self.restart_log()
        self.settle()

    def restart_log(self) -> None:
        """Go on with a log whose past is all durable: what is there is replayed and flushed."""
        self.ops = Crash(self.disk)
        for path in sorted(self.disk.rglob("*"), key=lambda path: len(path.parts)):
            name = str(path.relative_to(self.disk))
            if path.is_dir():
                self.ops.events.append(event("mkdir", path=name))
            else:
                self.ops._made += 1
                inode = self.ops._made
                self.ops.events += [
                    event("create", path=name, inode=inode),
                    event("pwrite", inode=inode, data=path.read_bytes()),
                    event("fsync", inode=inode),
                ]
        folders = [self.disk, *(path for path in self.disk.rglob("*") if path.is_dir())]
        self.ops.events += [event("fsync_dir", path=str(path.relative_to(self.disk))) for path in folders]

    @precondition(lambda self: bool(self.line))
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """The newest step, or any: what comes behind it is left behind."""
        step = data.draw(st.none() | st.sampled_from(sorted(self.line)))
        found = self.open_job().restore(step)
        assert found == (max(self.line) if step is None else step)
        assert self.state["v"] == self.line[found]
        assert torch.equal(self.state["t"], torch.arange(COUNT) * self.line[found])
        self.line = {known: content for known, content in self.line.items() if known <= found}
        self.base = found

    @rule(step=st.integers(100, 200))
    def restore_what_never_was(self, step: int) -> None:
        with pytest.raises(NotFound):
            self.open_job().restore(step)

    @rule()
    def end_job(self) -> None:
        if self.job is not None:
            self.job.close()
            self.job, self.base = None, None

    # ---- what anybody may rely on

    @invariant()
    def the_root_holds_the_line(self) -> None:
        if not hasattr(self, "line") or self.maybe is not None:
            return
        assert ce.steps(self.root) == sorted(self.line)
        for step, content in self.line.items():
            with ce.open(self.root, step) as checkpoint:
                assert checkpoint.values() == {"v": content}
                assert int(checkpoint.read("t", COUNT - 1)) == (COUNT - 1) * content

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            try:
                self.ops.dead_at = None
                self.end_job()
            except CheckpointError:
                pass
            self.folder.__exit__(None, None, None)


def event(name: str, **facts: Any) -> Any:
    return Event(name, **facts)


@pytest.mark.usefixtures("_one_compute_thread")
class TestCommitMachine(CommitMachine.TestCase):
    settings = settings(
        max_examples=25,
        stateful_step_count=14,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def setUp(self) -> None:
        logging.getLogger("ckptengine").setLevel(logging.CRITICAL)
        super().setUp()
