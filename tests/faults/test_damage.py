"""Damage at rest: flipped bits, cut and swapped and stale and missing files, damaged records; never a wrong byte."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine import native
from ckptengine.errors import (
    CheckpointError,
    Damaged,
    NotFound,
    RestoreIncomplete,
    StorageFailed,
    UnreadableFormat,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.bitflips import Flipper

from .states import blank, differences, load_exactly, set_state, state_of

STEPS = (1, 2, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three committed steps."""
    made = tmp_path / "root"
    state = state_of(0)
    with ce.Checkpointer(state, made, random=False) as checkpointer:
        for step in STEPS:
            set_state(state, step)
            checkpointer.save(step).result()
    return made


def rank_file(root: Path, step: int) -> Path:
    return next((root / f"step-{step:09d}").glob("rank-*"))


def manifest(root: Path, step: int) -> Path:
    return next((root / f"step-{step:09d}").glob("manifest-*"))


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def restore(root: Path, step: int | None = None, **settings: Any) -> tuple[int | None, dict[str, Any]]:
    state = blank()
    with ce.Checkpointer(state, root, random=False) as checkpointer:
        found = checkpointer.restore(step, **settings)
    return found, state


def assert_refused(root: Path, step: int) -> None:
    """The step is damaged: verify and reads say so, nobody loads it, and restore takes the one before."""
    with pytest.raises(CheckpointError), ce.open(root, step) as checkpoint:
        checkpoint.verify()
    with pytest.raises(CheckpointError):
        ce.load(blank(), root, step)
    found, state = restore(root)
    assert found == step - 1
    assert differences(state, step - 1) == []


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    flipper = Flipper(tmp_path / "root", seed=random.randrange(1 << 30))
    for _ in range(100):
        path, bit = flipper.choose()
        assert flipper.flip(path, bit) == [], f"bit {bit} of {path.name}"


def test_every_byte_of_the_manifest_s_header_and_of_the_tail(tmp_path: Path) -> None:
    flipper = Flipper(tmp_path / "root", seed=0)
    for path in flipper.files:
        size = path.stat().st_size
        header = path.read_bytes().index(b"\n") if path.suffix == ".json" else 0
        places = range(header) if header else range(size - 56, size)
        for byte in places:
            assert flipper.flip(path, 8 * byte + byte % 8) == [], f"byte {byte} of {path.name}"


@pytest.mark.parametrize("which", [rank_file, manifest])
@pytest.mark.parametrize("keep", [0, 1, 0.3, 0.9, -1])
def test_truncation(root: Path, which: Any, keep: float) -> None:
    path = which(root, 3)
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep < 0 else int(keep) if keep >= 1 else int(size * keep))
    assert_refused(root, 3)


@pytest.mark.parametrize("which", [rank_file, manifest])
def test_bytes_appended(root: Path, which: Any) -> None:
    with open(which(root, 3), "ab") as file:
        file.write(b"\0")
    assert_refused(root, 3)


def test_a_missing_rank_file(root: Path) -> None:
    rank_file(root, 3).unlink()
    assert_refused(root, 3)


def test_a_stale_rank_file_of_another_step(root: Path) -> None:
    """A whole, healthy file of the same rank and size under the newer step's name."""
    shutil.copyfile(rank_file(root, 2), rank_file(root, 3))
    assert_refused(root, 3)


def test_a_stale_step_under_another_name(root: Path) -> None:
    """The whole folder of an older step in place of a newer one's: healthy in itself, and not what it says."""
    shutil.rmtree(root / "step-000000003")
    shutil.copytree(root / "step-000000002", root / "step-000000003")
    with pytest.raises(CheckpointError):
        ce.open(root, 3)
    with pytest.raises(CheckpointError):
        ce.load(blank(), root, 3)
    assert restore(root)[0] == 2


def test_a_stale_rank_file_of_another_attempt(tmp_path: Path) -> None:
    root = tmp_path / "root"
    ce.save(state_of(1), root, 1)
    old = rank_file(root, 1).read_bytes()
    ce.save(state_of(1), root, 1)
    newest = sorted((root / "step-000000001").glob("rank-*"))[-1]
    newest.write_bytes(old)
    with pytest.raises(CheckpointError), ce.open(root, 1) as checkpoint:
        checkpoint.verify()
    found, state = restore(root)  # the save that was replaced is still there, whole
    assert found == 1
    assert differences(state, 1) == []


@pytest.mark.parametrize("copies", [1, 2])
def test_damaged_attempt_records(root: Path, copies: int) -> None:
    records = sorted((root / "attempts").glob("*.json"))
    assert len(records) == 2
    for path in records[:copies]:
        flip(path, 40)
    if copies == 1:
        assert restore(root)[0] == 3
        return
    for call in (lambda: restore(root), lambda: ce.steps(root), lambda: ce.load(blank(), root)):
        with pytest.raises(Damaged, match="attempts"):
            call()
    with ce.open(root / "step-000000003") as checkpoint:  # the steps themselves are whole
        checkpoint.verify()


def test_a_restore_reports_what_it_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ckptengine").setLevel(logging.WARNING)
    flip(rank_file(root, 3), 5000)
    manifest(root, 2).unlink()
    found, state = restore(root)
    assert found == 1
    assert differences(state, 1) == []
    assert any("step 3" in record.message and "digest" in record.message for record in caplog.records)


def test_nothing_good_is_an_error_and_changes_nothing(root: Path) -> None:
    for step in STEPS:
        os.truncate(rank_file(root, step), 100)
    state = blank()
    with ce.Checkpointer(state, root, random=False) as checkpointer, pytest.raises(Damaged, match="none is good"):
        checkpointer.restore()
    assert differences(state, 987_654) == []


def test_damage_that_shows_while_filling(root: Path) -> None:
    """All copies are damaged in their bytes only: the state is half filled, and is refused from then on."""
    for step in STEPS:
        flip(rank_file(root, step), 4096 + 100)
    state = blank()
    checkpointer = ce.Checkpointer(state, root, random=False)
    with pytest.raises(RestoreIncomplete):
        checkpointer.restore()
    for call in (lambda: checkpointer.save(9), lambda: checkpointer.step(9)):
        with pytest.raises(RestoreIncomplete):
            call()
    for step in STEPS:
        flip(rank_file(root, step), 4096 + 100)
    with pytest.raises(RestoreIncomplete):
        checkpointer.restore()
    checkpointer.close()
    assert restore(root)[0] == 3


def test_a_device_that_fails_while_reading_sends_restore_to_another_step(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = rank_file(root, 3).name
    original = native.read_ranges
    refused = []

    def read_ranges(files: native.Files, *arguments: Any, **options: Any) -> native.ReadDigests:
        if bad in files.name:
            refused.append(files.name)
            raise StorageFailed(f"cannot read {files.name}: {os.strerror(errno.EIO)}")
        return original(files, *arguments, **options)

    monkeypatch.setattr(native, "read_ranges", read_ranges)
    found, state = restore(root)
    assert refused
    assert found == 2
    assert differences(state, 2) == []


def test_load_without_a_step_takes_the_newest_good_one(root: Path) -> None:
    flip(rank_file(root, 3), 4096 + 100)
    assert load_exactly(root) == 2
    rank_file(root, 2).unlink()
    assert load_exactly(root) == 1
    with ce.open(root) as checkpoint:
        assert checkpoint.step == 3  # sizes hold: only reading its bytes tells
        with pytest.raises(Damaged):
            checkpoint.verify()
    with pytest.raises(NotFound):
        ce.open(root, 99)


def test_links_and_strangers_beneath_a_root_are_no_checkpoints(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    ce.save(state_of(8), other, 8)
    (root / "step-000000008").symlink_to(other / "step-000000008")
    (root / "step-000000009").write_bytes(b"a file")
    (root / "step-000000010").mkdir()
    (root / "step-000000010" / "manifest-a000001-n0001.json").mkdir()
    os.mkfifo(root / "step-000000010" / "manifest-a000001-n0002.json")
    (root / "step-000000010" / "manifest-a000001-n0003.json").symlink_to(manifest(root, 1))
    (root / "step-x").mkdir()
    assert [step for step in ce.steps(root) if step != 10] == list(STEPS)
    assert load_exactly(root) == 3
    assert restore(root)[0] == 3
    with pytest.raises((UnreadableFormat, NotFound, StorageFailed)):
        ce.open(root, 10)


def test_a_rank_file_that_is_a_link(root: Path, tmp_path: Path) -> None:
    away = tmp_path / "elsewhere.bin"
    path = rank_file(root, 3)
    path.rename(away)
    path.symlink_to(away)
    with pytest.raises(CheckpointError):
        ce.load(blank(), root, 3)


def test_reading_while_another_job_writes_changes_nothing(root: Path) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with ce.open(root) as checkpoint:
        checkpoint.verify()
        assert torch.equal(checkpoint.read("wide"), state_of(3)["wide"])
    load_exactly(root)
    ce.steps(root)
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
