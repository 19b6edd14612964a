"""Faults of one rank of two: nobody hangs, nothing acknowledged is lost, a late rank changes nothing that counts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptengine as ce
from ckptengine.errors import CheckpointError, Damaged, RankTimeout, RootInUse

from .hub import Ranks, outcome, ranks_in_process
from .ops import Fault, FaultyOps, Kind
from .states import blank, differences, set_state, state_of

WORLD = 2
WITHIN_S = 60.0
CASES: list[tuple[Kind, int, bool]] = [("fail", errno.ENOSPC, False), ("late", errno.EIO, True), ("short", 0, True)]
if os.environ.get("CKPTENGINE_ALL_FAULTS"):  # bench/soak.py
    CASES += [("fail", number, sticky) for number in (errno.EIO, errno.EROFS, errno.EMFILE) for sticky in (False, True)]
    CASES += [("tear", errno.EIO, False), ("tear", errno.ENOSPC, True), ("late", errno.EIO, False), ("short", 0, False)]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with ranks_in_process(WORLD, monkeypatch) as found:
        yield found


class Job:
    """A Checkpointer per rank, each with file operations of its own."""

    def __init__(self, ranks: Ranks, root: Path, rank_timeout_s: float = WITHIN_S, **settings: Any) -> None:
        self.ranks = ranks
        ranks.hub.messages.clear()
        self.states = [state_of(0, rank, WORLD) for rank in ranks.ranks]
        self.ops = [FaultyOps() for _ in ranks.ranks]
        self.members = ranks.all(
            lambda rank: ce.Checkpointer(
                self.states[rank], root, file_ops=self.ops[rank], rank_timeout_s=rank_timeout_s, random=False,
                on_failure=ce.Tolerate(), **settings,
            )
        )  # fmt: skip

    def start(self, step: int) -> list[ce.SaveHandle]:
        def one(rank: int) -> ce.SaveHandle:
            set_state(self.states[rank], step, rank, WORLD)
            return self.members[rank].save(step)

        return self.ranks.all(one)

    def save(self, step: int) -> list[CheckpointError | None]:
        """Save on all ranks; each rank's error."""
        handles = self.start(step)
        return self.ranks.all(lambda rank: handles[rank].exception(4 * WITHIN_S))

    def close(self) -> None:
        self.ranks.all(lambda rank: self.members[rank]._close(WITHIN_S))


def restore_exactly(ranks: Ranks, root: Path, step: int | None = None) -> int:
    """Restore on all ranks and prove every element; the step."""
    ranks.hub.messages.clear()
    states = [blank(rank, WORLD) for rank in ranks.ranks]
    members = ranks.all(lambda rank: ce.Checkpointer(states[rank], root, random=False, rank_timeout_s=WITHIN_S))
    try:
        found = ranks.all(lambda rank: members[rank].restore(step))
        assert len(set(found)) == 1
        assert found[0] is not None
        for rank, state in enumerate(states):
            assert differences(state, found[0], rank, WORLD) == []
        return found[0]
    finally:
        ranks.all(lambda rank: members[rank].close())


def read_exactly(root: Path, step: int) -> None:
    """Read every tensor of a step as a whole, whatever layout it was saved in, and prove every element."""
    halves = [state_of(step, rank, WORLD) for rank in range(WORLD)]
    whole = {name: value for name, value in halves[0].items() if isinstance(value, torch.Tensor)}
    whole["grid"] = torch.cat([half["grid"].tensor for half in halves])
    with ce.open(root, step) as checkpoint:
        assert set(checkpoint.names()) == set(whole)
        for name, value in whole.items():
            assert torch.equal(checkpoint.read(name), value), name


def count_operations(ranks: Ranks, root: Path, rank: int) -> int:
    job = Job(ranks, root)
    assert job.save(1) == [None] * WORLD
    job.ops[rank].arm(None)
    assert job.save(2) == [None] * WORLD
    job.close()
    return job.ops[rank].count


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize(("kind", "error", "sticky"), CASES)
def test_a_fault_at_every_operation_of_one_rank(
    ranks: Ranks, tmp_path: Path, rank: int, kind: Kind, error: int, sticky: bool
) -> None:
    total = count_operations(ranks, tmp_path / "count", rank)
    root = tmp_path / "root"
    job = Job(ranks, root)
    assert job.save(1) == [None] * WORLD
    good = [1]
    for at in range(total):
        step = 10 + 2 * at
        job.ops[rank].arm(Fault(at, kind, error, sticky))
        failed = job.save(step)
        where = f"operation {at} ({job.ops[rank].hit}) of rank {rank}"
        job.ops[rank].arm(None)
        if failed == [None] * WORLD:
            good.append(step)
        else:
            assert None not in failed, f"{where}: only some ranks heard of it: {failed}"
            assert kind != "short", where
            assert any(errno.errorcode[error] in str(one) for one in failed), f"{where}: {failed}"
        assert job.save(step + 1) == [None] * WORLD, where
        good.append(step + 1)
    job.close()
    assert set(good) <= set(ce.steps(root))
    if not sticky:  # else even the withdrawal of a name may have been refused: a step that is there, whole, or not
        assert good == ce.steps(root) or kind == "late"
    for step in ce.steps(root):
        read_exactly(root, step)
    assert restore_exactly(ranks, root) == good[-1]


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_rank_that_stops_for_longer_than_the_timeout(ranks: Ranks, tmp_path: Path, rank: int) -> None:
    """Stopped before each of its messages in turn, continued afterwards: what is committed stays whole."""
    good = 0
    for silent_until in range(6):
        root = tmp_path / f"root{silent_until}"
        job = Job(ranks, root, rank_timeout_s=0.3)
        assert job.save(1) == [None] * WORLD
        port = job.members[rank]._port
        count = 0
        original_put, original_get = port.put, port.get

        def tick(silent_until: int = silent_until) -> None:
            nonlocal count
            if count == silent_until:
                ranks.hub.stop(rank)
            count += 1

        def put(key: str, data: bytes, tick: Any = tick, call: Any = original_put) -> None:
            tick()
            call(key, data)

        def get(key: str, timeout_s: float, tick: Any = tick, call: Any = original_get) -> bytes:
            tick()
            return bytes(call(key, timeout_s))

        port.put, port.get = put, get  # type: ignore[method-assign]
        handles = job.start(2)
        other = handles[1 - rank]
        first = outcome(lambda other=other: other.exception(WITHIN_S))
        assert first is None or isinstance(first, CheckpointError), f"stopped before message {silent_until}: {first}"
        ranks.hub.go_on()
        last = outcome(lambda mine=handles[rank]: mine.exception(WITHIN_S))
        assert last is None or isinstance(last, CheckpointError)
        acknowledged = handles[0].exception(0) is None
        job.close()
        newest = restore_exactly(ranks, root)
        assert newest >= (2 if acknowledged else 1)
        good += acknowledged
    assert good >= 1


def test_a_dead_rank(ranks: Ranks, tmp_path: Path) -> None:
    """The other rank gets an error within the configured time, and its training may go on."""
    job = Job(ranks, tmp_path, rank_timeout_s=0.3)
    assert job.save(1) == [None] * WORLD
    ranks.hub.kill(1)
    failed = job.save(2)
    assert isinstance(failed[0], RankTimeout)
    assert failed[1] is not None
    job.close()
    ranks.hub.dead.clear()
    assert restore_exactly(ranks, tmp_path) == 1


def test_one_rank_damaged_sends_all_to_the_older_step(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(ranks, tmp_path)
    assert job.save(1) == [None] * WORLD
    assert job.save(2) == [None] * WORLD
    job.close()
    path = next((tmp_path / "step-000000002").glob("rank-00001-*"))
    data = bytearray(path.read_bytes())
    data[4096 + 17] ^= 4
    path.write_bytes(data)
    with pytest.raises(Damaged):
        restore_exactly(ranks, tmp_path, 2)
    assert restore_exactly(ranks, tmp_path) == 1
    assert ce.steps(tmp_path) == [1]  # the damaged one belongs to an abandoned line now


def test_rank_files_swapped_between_ranks_are_found(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(ranks, tmp_path)
    assert job.save(1) == [None] * WORLD
    job.close()
    files = sorted((tmp_path / "step-000000001").glob("rank-*"))
    contents = [path.read_bytes() for path in files]
    for path, data in zip(files, reversed(contents), strict=True):
        path.write_bytes(data)
    with pytest.raises(Damaged):
        restore_exactly(ranks, tmp_path)
    with pytest.raises(Damaged):
        ce.open(tmp_path, 1).verify()


def test_every_rank_hears_that_the_root_is_in_use(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(ranks, tmp_path)
    ranks.hub.messages.clear()
    refused = ranks.all(lambda rank: outcome(lambda: ce.Checkpointer(state_of(1, rank, WORLD), tmp_path)))
    assert [type(one) for one in refused] == [RootInUse] * WORLD
    job.close()


def test_an_error_on_one_rank_alone_does_not_hang_the_other(ranks: Ranks, tmp_path: Path) -> None:
    """Different steps, a missing tensor, a value that has no encoding."""
    job = Job(ranks, tmp_path)
    handles = ranks.all(lambda rank: job.members[rank].save(rank))
    errors = ranks.all(lambda rank: handles[rank].exception(WITHIN_S))
    assert all(isinstance(error, CheckpointError) for error in errors)
    grids = [state.pop("grid") for state in job.states]
    job.states[0]["grid"] = grids[0]
    handles = ranks.all(lambda rank: job.members[rank].save(3))
    errors = ranks.all(lambda rank: handles[rank].exception(WITHIN_S))
    assert all(isinstance(error, CheckpointError) for error in errors), errors
    assert "grid" in str(errors[0])
    job.states[1]["grid"] = grids[1]
    assert job.save(4) == [None] * WORLD
    job.close()
    assert restore_exactly(ranks, tmp_path) == 4
