"""Real power cuts: a loop-mounted file system is shut down by force, mounted again, and looked at.

Needs root, loop devices and the file system's mkfs; skipped with the reason elsewhere (the emulation in `test_power`
runs everywhere).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ckptengine as ce

from .ops import Fault, FaultyOps
from .states import blank, differences, load_exactly, set_state, state_of

WITHIN_S = 60.0
_SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32): the same request for ext4 and XFS."""
NAMES_KEPT, NOTHING_KEPT = 1, 2
"""Flags: the log is flushed and unsynced data is lost; everything that was not forced out is lost."""
SIZES_MIB = {"ext4": 48, "xfs": 320}


class Disk:
    """A file system in an image file."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.mount_point = folder / "mnt"
        self._image = folder / "image"
        self.mount_point.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(SIZES_MIB[kind] << 20)
        _run(f"mkfs.{kind}", "-q", str(self._image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.mount_point))

    def unmount(self) -> None:
        _run("umount", str(self.mount_point))

    def cut(self, flag: int) -> None:
        """Cut the power: nothing reaches the file system from here on."""
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(fd)

    def power_on(self) -> None:
        self.unmount()
        self.mount()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    kind = str(request.param)
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"no mkfs.{kind} on this machine")
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = Disk(Path(folder), kind)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot loop-mount {kind}: {error.stderr.decode(errors='replace').strip()}")
        yield made
        with contextlib.suppress(subprocess.CalledProcessError):
            made.unmount()


@dataclass
class CutOps(FaultyOps):
    """Cuts the power in front of operation ``at``."""

    disk: Disk | None = None
    flag: int = NOTHING_KEPT
    at: int = -1

    def _decide(self, name: str) -> Fault | None:
        if self.count == self.at and self.disk is not None:
            self.disk.cut(self.flag)
        return super()._decide(name)


def check(root: Path, acknowledged: list[int], tried: int) -> None:
    there = ce.steps(root)
    assert set(acknowledged) <= set(there) <= {*acknowledged, tried}
    for step in acknowledged:
        assert load_exactly(root, step) == step
    state = blank()
    with ce.Checkpointer(state, root, random=False) as checkpointer:
        found = checkpointer.restore()
        assert found is not None
        assert found >= max(acknowledged)
        assert differences(state, found) == []
        set_state(state, tried + 1)
        checkpointer.save(tried + 1).result(WITHIN_S)
    assert load_exactly(root) == tried + 1


@pytest.mark.parametrize("flag", [NAMES_KEPT, NOTHING_KEPT])
def test_a_cut_in_front_of_every_third_operation(disk: Disk, flag: int) -> None:
    """Power goes in the middle of the second save; the first was acknowledged."""
    failed: object = None
    at = flag % 3
    while failed is not None or at < 3:
        root = disk.mount_point / f"root-{flag}-{at}"
        ops = CutOps(disk=disk, flag=flag)
        state = state_of(1)
        checkpointer = ce.Checkpointer(state, root, file_ops=ops, random=False, on_failure=ce.Tolerate())
        checkpointer.save(1).result(WITHIN_S)
        set_state(state, 2)
        ops.arm(None)
        ops.at = at
        failed = checkpointer.save(2).exception(WITHIN_S)
        ops.at = -1
        if failed is None:
            disk.cut(flag)
        checkpointer.close()
        del checkpointer
        disk.power_on()
        check(root, [1] if failed is not None else [1, 2], 2)
        shutil.rmtree(root)
        at += 3
    assert at > 12  # as many operations as a save has


@pytest.mark.parametrize("flag", [NAMES_KEPT, NOTHING_KEPT])
def test_a_cut_right_after_the_acknowledgement(disk: Disk, flag: int) -> None:
    """The default engine, direct writes included: what `result` said is there."""
    for cycle in range(3):
        root = disk.mount_point / f"run-{flag}-{cycle}" / "deep" / "root"
        state = state_of(1)
        checkpointer = ce.Checkpointer(state, root, random=False)
        acknowledged = []
        for step in range(1, cycle + 2):
            set_state(state, step)
            acknowledged.append(checkpointer.save(step).result(WITHIN_S))
        disk.cut(flag)
        checkpointer.close()
        disk.power_on()
        check(root, acknowledged, cycle + 2)


def test_a_careless_writer_is_found_out(disk: Disk) -> None:
    """Without flushes the same cut loses the checkpoint: the tests above can fail."""

    class Careless(FaultyOps):
        def fsync(self, fd: int) -> None:
            return None

        def fsync_dir(self, path: Path) -> None:
            return None

    root = disk.mount_point / "careless"
    checkpointer = ce.Checkpointer(state_of(1), root, file_ops=Careless(), random=False)
    checkpointer.save(1).result(WITHIN_S)
    disk.cut(NOTHING_KEPT)
    checkpointer.close()
    disk.power_on()
    assert ce.steps(root) == []
