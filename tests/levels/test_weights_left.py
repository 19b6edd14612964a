"""Weights that a deadline left: `prune` removes them once a whole step that is as new is there and holds."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce
from ckptengine.cli import main
from ckptengine.operations.stopping.last_save import weights_root
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import open_tier

from .jobs import flip, state_of


def leave(root: str, step: int) -> Path:
    """The weights of ``step`` as the last save leaves them."""
    where = weights_root(root, step)
    with ce.Checkpointer(state_of(step), where, random=False, linear=False) as weights:
        weights.save(step).result()
    return Path(where)


def prune(capsys: pytest.CaptureFixture[str], root: str, *arguments: str) -> dict[str, Any]:
    assert main(["prune", root, "--keep-last", "2", *arguments, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def names_on(root: str) -> list[str]:
    loop = IoLoop()
    try:
        return [entry.name for entry in BlockingTier(open_tier(root, loop), loop).entries("weights-only-")]
    finally:
        loop.close()


@pytest.mark.parametrize("kind", ["directory", "url"])
def test_they_stay_until_a_whole_step_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    root = str(tmp_path / "root")
    if kind == "url":
        pytest.importorskip("fsspec", reason="fsspec is not installed")
        root = f"memory://{uuid.uuid4().hex}/run"
    ce.save(state_of(4), root, 4)
    leave(root, 5)
    (told,) = prune(capsys, root)["weights"]
    assert (told["step"], told["removed"], told["why"]) == (5, False, "no whole step from 5 on is committed")
    assert ce.steps(weights_root(root, 5)) == [5]

    ce.save(state_of(5), root, 5)
    said = prune(capsys, root, "--dry-run")
    (told,) = said["weights"]
    assert (told["removed"], told["why"]) == (True, "step 5 is whole and verified")
    assert said["freed_bytes"] == told["size_bytes"] > 0
    assert ce.steps(weights_root(root, 5)) == [5], "nothing is removed by asking"

    assert main(["prune", root, "--keep-last", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("deleted weights-only-step-000000005 (")
    assert "steps that stay: 4, 5" in text
    assert names_on(root) == []
    assert not list(tmp_path.glob("root/weights*")), "not even its folder and lock"
    assert ce.steps(root) == [4, 5]
    assert prune(capsys, root)["weights"] == []


def test_a_damaged_step_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = leave(str(tmp_path), 5)
    ce.save(state_of(6), tmp_path, 6)
    file = flip(tmp_path, 6)
    (told,) = prune(capsys, str(tmp_path))["weights"]
    assert told["removed"] is False
    assert told["why"].startswith("step 6 is damaged: ")
    assert file.name in told["why"]
    ce.open(where).verify()


def test_what_is_not_part_of_them_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = leave(str(tmp_path), 5)
    ce.save(state_of(6), tmp_path, 6)
    with ce.Checkpointer(state_of(7), where, random=False, linear=False) as somebody:
        somebody.save(7).result()
        (told,) = prune(capsys, str(tmp_path))["weights"]
        assert told["removed"] is False, "somebody trains on there"
    assert ce.steps(where) == [5, 7]
    other = leave(str(tmp_path), 4)
    (other / "notes.txt").write_text("mine")
    told = prune(capsys, str(tmp_path))["weights"]
    assert [one["removed"] for one in told] == [False, False]
    assert "notes.txt is not part of it" in told[0]["why"]
    assert ce.steps(other) == [4]


def test_weights_that_a_live_job_holds_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = leave(str(tmp_path), 5)
    ce.save(state_of(6), tmp_path, 6)
    with ce.Checkpointer(state_of(5), where, random=False, linear=False) as writing:
        writing.save(5).result()
        (told,) = prune(capsys, str(tmp_path))["weights"]
        assert told["removed"] is False
        assert "holds it" in told["why"]
    assert ce.steps(where) == [5]
    (told,) = prune(capsys, str(tmp_path))["weights"]
    assert told["removed"] is True
    assert not where.exists()
