"""A save that one rank cannot register: it raises there, the others hear of it at once, and the next one goes well."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce
from ckptengine.errors import CheckpointError, SaveFailed, UnsupportedValue, UnusableRequest
from ckptengine.operations.saving.handle import SaveHandle

from .hub import Ranks, outcome, ranks_in_process
from .states import set_state, state_of
from .test_two_ranks import restore_exactly

WORLD = 2
PROMPT_S = 20.0
"""The others must know long before `TIMEOUT_S`."""
TIMEOUT_S = 60.0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with ranks_in_process(WORLD, monkeypatch) as found:
        yield found


def members_of(ranks: Ranks, states: list[Any], root: Path, **settings: Any) -> list[ce.Checkpointer]:
    return ranks.all(
        lambda rank: ce.Checkpointer(states[rank], root, rank_timeout_s=TIMEOUT_S, random=False, **settings)
    )


class Refuses:
    """An object of the state whose `state_dict` fails on some rank."""

    def __init__(self) -> None:
        self.refuses = False

    def state_dict(self) -> dict[str, int]:
        if self.refuses:
            raise ValueError("not just now")
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"n": 1}


Spoilt = tuple[Callable[[], None], type[CheckpointError], type[Exception], str]
"""How it is mended, what others hear, what the rank itself raises, and what the message says."""


def unsavable(states: list[Any], bad: int) -> Spoilt:
    states[bad]["plan"]["hook"] = object()
    return lambda: states[bad]["plan"].pop("hook"), UnsupportedValue, UnsupportedValue, r"plan.*hook"


def failing_object(states: list[Any], bad: int) -> Spoilt:
    states[bad]["object"].refuses = True

    def mend() -> None:
        states[bad]["object"].refuses = False

    return mend, CheckpointError, Exception, "not just now"


@pytest.mark.parametrize("overlap", ["wait", "skip", "latest"])
@pytest.mark.parametrize("bad", range(WORLD))
@pytest.mark.parametrize("spoil", [unsavable, failing_object])
def test_every_rank_hears_why(ranks: Ranks, tmp_path: Path, bad: int, spoil: Any, overlap: str) -> None:
    states = [{**state_of(0, rank, WORLD), "plan": {}, "object": Refuses()} for rank in ranks.ranks]
    members = members_of(ranks, states, tmp_path, overlap=overlap, on_failure=ce.Tolerate())
    mend, kind, own, told = spoil(states, bad)
    for step in (1, 2):  # twice: the second one finds nobody out of step
        began_s = time.monotonic()
        got = ranks.all(lambda rank, step=step: outcome(lambda: members[rank].save(step)))  # type: ignore[misc]
        assert isinstance(got[bad], own)
        other = got[1 - bad]
        assert isinstance(other, ce.SaveHandle)
        error = other.exception(PROMPT_S)
        assert isinstance(error, kind)
        assert str(error).startswith(f"this save was not registered on every rank: rank {bad}: ")
        assert re.search(told, str(error)), error
        assert time.monotonic() - began_s < PROMPT_S
    mend()
    for rank in ranks.ranks:
        set_state(states[rank], 3, rank, WORLD)
    handles = ranks.all(lambda rank: members[rank].save(3))
    assert ranks.all(lambda rank: handles[rank].result(TIMEOUT_S)) == [3, 3]
    ranks.all(lambda rank: members[rank]._close(TIMEOUT_S))
    assert ce.steps(tmp_path) == [3]
    left = [key for key in ranks.hub.messages if key.startswith("structure/")]
    assert left == ["structure/3/out"], "nothing is left of what was refused"


@pytest.mark.parametrize("bad", range(WORLD))
@pytest.mark.parametrize(
    ("arguments", "own", "told"),
    [
        ((-1, None), UnusableRequest, "step -1 is not a whole number"),
        ((1, {"loss": "low"}), UnsupportedValue, "metrics\\['loss'\\]"),
    ],
)
def test_bad_arguments_on_one_rank(
    ranks: Ranks, tmp_path: Path, bad: int, arguments: tuple[int, Any], own: type[CheckpointError], told: str
) -> None:
    states = [state_of(1, rank, WORLD) for rank in ranks.ranks]
    members = members_of(ranks, states, tmp_path, on_failure=ce.Tolerate())

    def save(rank: int) -> ce.SaveHandle:
        step, metrics = arguments if rank == bad else (1, None)
        return members[rank].save(step, metrics=metrics)

    got = ranks.all(lambda rank: outcome(lambda: save(rank)))
    assert isinstance(got[bad], own)
    error = got[1 - bad].exception(PROMPT_S)
    assert isinstance(error, own)
    with pytest.raises(own, match=f"rank {bad}: {told}"):
        raise error
    handles = ranks.all(lambda rank: members[rank].save(1))
    assert ranks.all(lambda rank: handles[rank].result(TIMEOUT_S)) == [1, 1]
    ranks.all(lambda rank: members[rank]._close(TIMEOUT_S))
    assert restore_exactly(ranks, tmp_path) == 1


def fail_one(member: ce.Checkpointer) -> None:
    """Let a save of this rank alone have failed."""
    handle = SaveHandle(0)
    member._troubles.watch(handle)
    handle.fail(SaveFailed("the disk was full"))


@pytest.mark.parametrize("bad", range(WORLD))
def test_an_earlier_failure_that_only_one_rank_has_heard_of(ranks: Ranks, tmp_path: Path, bad: int) -> None:
    states = [state_of(2, rank, WORLD) for rank in ranks.ranks]
    members = members_of(ranks, states, tmp_path, interval=ce.Every(steps=2))
    fail_one(members[bad])
    quiet = ranks.all(lambda rank: outcome(lambda: members[rank].step(1)))
    assert isinstance(quiet[bad], SaveFailed), "it surfaces at any hook"
    assert quiet[1 - bad] is None
    fail_one(members[bad])
    got = ranks.all(lambda rank: outcome(lambda: members[rank].step(2)))
    assert isinstance(got[bad], SaveFailed)
    assert "the disk was full" in str(got[1 - bad].exception(PROMPT_S))
    assert isinstance(outcome(lambda: members[1 - bad]._troubles.surface(None)), SaveFailed), "it is heard of here too"
    handles = ranks.all(lambda rank: members[rank].save(2))
    assert ranks.all(lambda rank: handles[rank].result(TIMEOUT_S)) == [2, 2]
    ranks.all(lambda rank: members[rank].close(TIMEOUT_S))
    assert restore_exactly(ranks, tmp_path) == 2


def test_closing_after_a_refusal_waits_for_nobody(ranks: Ranks, tmp_path: Path) -> None:
    states: list[Any] = [{"a": object() if rank else 1} for rank in ranks.ranks]
    members = members_of(ranks, states, tmp_path)
    with pytest.raises(UnsupportedValue):
        ranks.all(lambda rank: members[rank].save(1) if rank else None)
    began_s = time.monotonic()
    ranks.all(lambda rank: members[rank].close() if rank else None)
    assert time.monotonic() - began_s < PROMPT_S
    handle = ranks.all(lambda rank: members[rank].save(1) if not rank else None)[0]
    assert handle is not None
    assert isinstance(handle.exception(PROMPT_S), UnsupportedValue), "it was told before it went"
    ranks.all(lambda rank: members[rank]._close(PROMPT_S) if not rank else None)
