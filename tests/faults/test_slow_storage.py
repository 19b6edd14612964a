"""Storage that is slower than training: one warning that says what to do, and only where the arena is what is full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.operations.saving import slow_storage
from ckptengine.snapshot.port import Progress

WITHIN_S = 60.0


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ckptengine")


def progress(*, starved: bool) -> Progress:
    return Progress(captured_bytes=0, written_bytes=0, total_bytes=5 << 30, copied_bytes=0, peak_bytes=64 << 20,
                    starved=starved)  # fmt: skip


def test_only_what_blocks_long_for_a_full_arena_is_told_and_once(caplog: pytest.LogCaptureFixture) -> None:
    hint = slow_storage.SlowStorage()
    hint.look(1, progress(starved=False), 9.0)
    hint.look(2, progress(starved=True), slow_storage.LONG_S / 2)
    assert not caplog.records
    for step in (3, 4):
        hint.look(step, progress(starved=True), 1.25)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.ckptengine == {"step": 3, "fence_s": 1.25, "bytes": 5 << 30}  # type: ignore[attr-defined]
    for words in ("step 3", "1.2 s", "64 MiB of a state of 5120 MiB", "arena_bytes", "shm://", "less frequent"):
        assert words in record.getMessage()


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_a_slow_disk_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_storage, "LONG_S", 0.1)
    state = {"t": torch.arange(6 << 20, dtype=torch.float32)}
    try:
        with ce.Checkpointer(state, tmp_path, random=False, arena_bytes=8 << 20) as checkpointer:
            native.arm_fault("write", sticky=True, delay_s=0.15)
            for step in (1, 2):
                handle = checkpointer.save(step)
                checkpointer.fence()
                assert handle.progress["fence_ms"] > 100
            native.disarm_faults()
            checkpointer.wait()
    finally:
        native.disarm_faults()
    assert [r.getMessage()[:18] for r in caplog.records if "arena_bytes" in r.getMessage()] == ["the save of step 1"]


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_an_arena_that_holds_the_state_is_not_blamed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_storage, "LONG_S", 0.0)
    state = {"t": torch.arange(2 << 20, dtype=torch.float32)}
    try:
        with ce.Checkpointer(state, tmp_path, random=False, arena_bytes=32 << 20) as checkpointer:
            native.arm_fault("write", sticky=True, delay_s=0.15)
            checkpointer.save(1)
            checkpointer.fence()
            native.disarm_faults()
            checkpointer.wait()
    finally:
        native.disarm_faults()
    assert not [record for record in caplog.records if "arena_bytes" in record.getMessage()]
