"""A run that starts from another checkpoint: ours or foreign, on every rank or on none, once and not again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptengine as ce
from ckptengine import api
from ckptengine.errors import CheckpointError, NotFound, RanksDisagree

from .hub import Ranks, outcome, ranks_in_process
from .states import blank, differences, set_state, state_of

RULES = """version = 1
[[rule]]
match = "w"
rename = "weight"
"""


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with ranks_in_process(2, monkeypatch) as found:
        monkeypatch.setattr(api, "choose", found.choose)
        yield found


def foreign(path: Path) -> Path:
    """What torch.save makes of a state of another job."""
    torch.save({"model": {"w": torch.arange(12.0).reshape(3, 4)}, "epoch": 3}, path)
    return path


def live() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(3, 4)}, "epoch": 0}


def test_the_root_comes_first_once_it_has_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = foreign(tmp_path / "start.pt")
    state = live()
    with ce.Checkpointer(state, tmp_path / "run", start_from=start) as checkpointer:
        assert checkpointer.restore() == 0
        assert torch.equal(state["model"]["w"], torch.arange(12.0).reshape(3, 4))
        assert state["epoch"] == 3
        with pytest.raises(NotFound):
            checkpointer.restore(1)
        state["model"]["w"] += 1
        checkpointer.save(1)
    state = live()
    with ce.Checkpointer(state, tmp_path / "run", start_from=start) as checkpointer:
        assert checkpointer.restore() == 1
    assert torch.equal(state["model"]["w"], torch.arange(12.0).reshape(3, 4) + 1)
    assert not caplog.records


def test_starting_from_a_root_of_ours_falls_back_over_what_is_damaged(tmp_path: Path) -> None:
    for step in (2, 4):
        ce.save(state_of(step), tmp_path / "other", step)
    (file,) = (tmp_path / "other" / "step-000000004").glob("rank-*.bin")
    file.write_bytes(file.read_bytes()[:64] + b"?" * 200 + file.read_bytes()[264:])
    for start, step in ((tmp_path / "other", 2), (f"{tmp_path / 'other'}@2", 2)):
        state = blank()
        with ce.Checkpointer(state, tmp_path / "run", start_from=start, random=False) as checkpointer:
            assert checkpointer.restore() == step
        assert differences(state, step) == []
    damaged = f"{tmp_path / 'other'}@4"
    with (
        ce.Checkpointer(blank(), tmp_path / "run", start_from=damaged) as checkpointer,
        pytest.raises(CheckpointError, match="checkpoints exist and none is good"),
    ):
        checkpointer.restore()


def test_rules_say_what_its_pieces_mean(tmp_path: Path) -> None:
    save_file({"w": torch.arange(12.0).reshape(3, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "rules.toml").write_text(RULES)
    state = {"model": {"weight": torch.zeros(3, 4)}}
    start = tmp_path / "model.safetensors"
    with ce.Checkpointer(state, tmp_path / "run", start_from=start, rules=tmp_path / "rules.toml") as checkpointer:
        assert checkpointer.restore() == 0
    assert torch.equal(state["model"]["weight"], torch.arange(12.0).reshape(3, 4))


def test_two_ranks_start_alike(ranks: Ranks, tmp_path: Path) -> None:
    start = foreign(tmp_path / "start.pt")
    states = [live() for _ in ranks.ranks]

    def job(rank: int) -> list[int | None]:
        with ce.Checkpointer(states[rank], tmp_path / "run", start_from=start, random=False) as checkpointer:
            steps = [checkpointer.restore(), checkpointer.restore()]
            checkpointer.save(7).result()
            return [*steps, checkpointer.restore()]

    assert ranks.all(job) == [[0, 0, 7]] * 2
    assert all(torch.equal(state["model"]["w"], torch.arange(12.0).reshape(3, 4)) for state in states)


def test_a_rank_that_cannot_open_it_keeps_nobody_waiting(ranks: Ranks, tmp_path: Path) -> None:
    for rank in ranks.ranks:
        (tmp_path / str(rank)).mkdir()
    foreign(tmp_path / "0" / "start.pt")
    states = [live() for _ in ranks.ranks]

    def job(rank: int) -> tuple[CheckpointError | None, CheckpointError | None]:
        start = tmp_path / str(rank) / "start.pt"
        with ce.Checkpointer(states[rank], tmp_path / "run", start_from=start, random=False) as checkpointer:
            return outcome(checkpointer.restore), outcome(lambda: ce.load(states[rank], start))

    (first, loaded), (second, _) = ranks.all(job)
    for error in (first, loaded):
        assert isinstance(error, RanksDisagree)
        assert "rank 1: there is no checkpoint" in str(error)
    assert isinstance(second, NotFound)
    assert all(not state["model"]["w"].any() for state in states)


def test_a_root_with_another_framework_s_checkpoint_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(0)
    with ce.Checkpointer(state, tmp_path / "run") as checkpointer:
        assert checkpointer.restore() is None
    assert not caplog.records
    foreign(tmp_path / "run" / "start.pt")
    with caplog.at_level(logging.WARNING, "ckptengine"), ce.Checkpointer(state, tmp_path / "run") as checkpointer:
        assert checkpointer.restore() is None
        assert "give it as start_from" in caplog.text
        caplog.clear()
        set_state(state, 1)
        checkpointer.save(1).result()
        assert checkpointer.restore() == 1
    assert not caplog.records
