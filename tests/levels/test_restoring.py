"""Restoring across tiers: the nearest that has each piece intact; empty, damaged and missing ones; what was left."""

from __future__ import annotations

import logging
import shutil
import uuid
from pathlib import Path

import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError, Damaged

from ..tiers.services import make_bucket, moto, s3_options
from .jobs import flip, folder_of, is_exactly, run_steps, set_state, state_of

WITHIN_S = 20.0


@pytest.fixture
def tiers(tmp_path: Path, memory: str) -> list[ce.Tier]:
    """Two tiers with everything, in front of ``tmp_path / "root"``, which has it too: steps 1 to 3."""
    tiers = [ce.Tier(memory, keep=ce.Keep()), ce.Tier(tmp_path / "disk", keep=ce.Keep())]
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path / "root", tiers=tiers, interval=ce.Every(steps=1)) as checkpointer:
        run_steps(checkpointer, state, range(1, 4))
    return tiers


def restored(root: Path | str, tiers: list[ce.Tier], step: int | None = None) -> int | None:
    state = state_of(0)
    with ce.Checkpointer(state, root, tiers=tiers) as checkpointer:
        found = checkpointer.restore(step)
    assert found is None or is_exactly(state, found)
    return found


def test_the_nearest_tier_is_read(tmp_path: Path, tiers: list[ce.Tier], caplog: pytest.LogCaptureFixture) -> None:
    for folder in (tmp_path / "disk", tmp_path / "root"):
        for step in (1, 2, 3):
            flip(folder, step)  # nobody must need these
    with caplog.at_level(logging.INFO, "ckptengine"):
        assert restored(tmp_path / "root", tiers) == 3
    assert f"bytes from {folder_of(tiers[0].path)}" in caplog.text


def test_a_damaged_piece_comes_from_the_next_tier(
    tmp_path: Path, tiers: list[ce.Tier], memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = flip(folder_of(memory), 3)
    with caplog.at_level(logging.INFO, "ckptengine"):
        assert restored(tmp_path / "root", tiers) == 3
    (used,) = [record.ckptengine["used_bytes"] for record in caplog.records if "was restored" in record.getMessage()]
    assert set(used) == {str(folder_of(memory)), str(tmp_path / "disk")}, "only what is damaged comes from further off"
    assert damaged.name in caplog.text, "what was wrong is said"


def test_a_missing_file_comes_from_the_next_tier(tmp_path: Path, tiers: list[ce.Tier], memory: str) -> None:
    flip(folder_of(memory), 3).unlink()
    flip(tmp_path / "disk", 3).unlink()
    assert restored(tmp_path / "root", tiers) == 3


def test_damage_everywhere_falls_back_to_an_older_step(tmp_path: Path, tiers: list[ce.Tier], memory: str) -> None:
    for folder in (folder_of(memory), tmp_path / "disk", tmp_path / "root"):
        flip(folder, 3)
    assert restored(tmp_path / "root", tiers) == 2
    for folder in (folder_of(memory), tmp_path / "disk", tmp_path / "root"):
        for step in (1, 2):
            flip(folder, step).unlink()
    with pytest.raises(Damaged):
        restored(tmp_path / "root", tiers)


def test_an_empty_first_tier(tmp_path: Path, tiers: list[ce.Tier], memory: str) -> None:
    """A node that was replaced: nothing of the root is forgotten, and no attempt is claimed twice."""
    shutil.rmtree(folder_of(memory))
    shutil.rmtree(tmp_path / "disk")
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path / "root", tiers=tiers, interval=ce.Every(steps=1)) as checkpointer:
        assert checkpointer.restore() == 3
        assert is_exactly(state, 3)
        run_steps(checkpointer, state, range(4, 5))
    assert ce.steps(tmp_path / "root") == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "root" / "attempts").glob("*.claim")) == [
        "000001.claim",
        "000002.claim",
    ]


def test_an_older_step_abandons_what_came_after_everywhere(tmp_path: Path, tiers: list[ce.Tier], memory: str) -> None:
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path / "root", tiers=tiers, interval=ce.Every(steps=1)) as checkpointer:
        assert checkpointer.restore(2) == 2
        for folder in (folder_of(memory), tmp_path / "disk", tmp_path / "root"):
            assert ce.steps(folder) == [1, 2]
        set_state(state, 9)
        checkpointer.save(9).result(WITHIN_S)
    assert ce.steps(tmp_path / "root") == [1, 2, 9]


def test_what_a_dead_job_left_in_memory_reaches_the_root(tmp_path: Path, memory: str) -> None:
    tiers = [ce.Tier(memory)]
    root = tmp_path / "root"
    state = state_of(1)
    first = ce.Checkpointer(state, root, tiers=tiers)
    first.save(1).result(WITHIN_S)
    set_state(state, 2)
    root.rename(tmp_path / "away")
    root.write_bytes(b"")
    assert first.save(2).exception(WITHIN_S) is not None
    with pytest.raises(CheckpointError):
        first.close()
    root.unlink()
    (tmp_path / "away").rename(root)
    assert ce.steps(root) == [1]
    with ce.Checkpointer(state, root, tiers=tiers) as second:
        assert second.restore() == 2
        assert is_exactly(state, 2)
        set_state(state, 3)
        second.save(3).result(WITHIN_S)
    assert ce.steps(root) == [1, 2, 3]


def test_a_url_as_root() -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    url = f"memory://{uuid.uuid4().hex}/run"
    assert ce.save(state_of(4), url, 4) == 4
    assert ce.steps(url) == [4]
    state = state_of(0)
    assert ce.load(state, url) == 4
    assert is_exactly(state, 4)
    with ce.Checkpointer(state, url, interval=ce.Every(steps=2), keep=ce.Keep(last=2)) as checkpointer:
        assert checkpointer.restore() == 4
        handles = run_steps(checkpointer, state, range(5, 11))
        landing = checkpointer._places.landing.path
        assert landing.is_dir()
        assert checkpointer.wait()
        assert [handle.stage for handle in handles if handle is not None] == ["durable"] * 3
    assert not landing.exists(), "nothing is left in host memory"
    assert ce.steps(url) == [8, 10]
    checkpoint = ce.open(url)
    checkpoint.verify()
    assert checkpoint.read("small").tolist() == [10, -10]
    checkpoint.close()


def test_three_tiers_to_s3(tmp_path: Path, memory: str) -> None:
    with moto(tmp_path) as endpoint:
        import asyncio

        asyncio.run(make_bucket(endpoint))
        root = "s3://ckpt/run"
        tiers = [ce.Tier(memory), ce.Tier(tmp_path / "disk")]
        state = state_of(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", str(s3_options(endpoint)["key"]))
            patch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_options(endpoint)["secret"]))
            with ce.Checkpointer(state, root, tiers=tiers, interval=ce.Every(steps=2)) as checkpointer:
                run_steps(checkpointer, state, range(1, 5))
            assert ce.steps(root) == [2, 4]
            shutil.rmtree(folder_of(memory))
            flip(tmp_path / "disk", 4)
            assert restored(root, tiers) == 4
            assert restored(root, []) == 4
