"""The demo's story: one run that is never stopped, one that is killed inside a save and resumed; then compare."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptengine.errors import CheckpointError, UnusableRequest
from ckptengine.store.listing import list_steps
from ckptengine.store.root import Root

STEPS = 60
EVERY = 5
KILL_AT = 35
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run as its files tell it: exact losses and the saves of rank 0."""

    losses: dict[int, str]
    saves: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Story:
    """What happened.  ``same`` says whether the two runs ended with the same bits."""

    straight: Run
    resumed: Run
    killed_at: int
    resumed_from: int
    differing: list[str]
    differing_losses: list[int]

    @property
    def same(self) -> bool:
        return not self.differing and not self.differing_losses


def tell(
    directory: Path, ranks: int, say: Say, *, steps: int = STEPS, every: int = EVERY, kill_at: int = KILL_AT
) -> Story:
    """Run the demo in ``directory`` (which must be new or empty) with ``ranks`` processes."""
    if directory.exists() and any(directory.iterdir()):
        raise UnusableRequest(f"{directory} is not empty; name a new directory with --dir")
    directory.mkdir(parents=True, exist_ok=True)
    sizes = ["--steps", str(steps), "--every", str(every)]
    say(f"1/3  a run that is never stopped ({steps} steps, a save every {every})")
    _expect(_train(directory, ranks, "straight", sizes, say), 0, directory)
    say(f"2/3  the same run, killed with SIGKILL in the middle of the save of step {kill_at}")
    status = _train(directory, ranks, "resumed", [*sizes, "--kill-at", str(kill_at)], say)
    _expect(status, -signal.SIGKILL, directory)
    for entry in list_steps(Root(directory / "resumed")):
        say(f"       step {entry.step:>3}  {entry.state}{'  ' + entry.reason if entry.reason else ''}")
    say("3/3  started again: it resumes from the newest checkpoint that verifies")
    before = _committed(directory / "resumed")
    _expect(_train(directory, ranks, "resumed", sizes, say), 0, directory)
    return _compare(directory, ranks, kill_at, max(before))


def _committed(root: Path) -> list[int]:
    steps = list(Root(root).history.line())
    if not steps:
        raise CheckpointError(f"{root}: the killed run left no committed checkpoint")
    return steps


def _train(directory: Path, ranks: int, run: str, arguments: list[str], say: Say) -> int:
    """Start the ranks of one run; the exit status of the first that ends badly (a signal as its negative)."""
    command = [sys.executable, "-m", "ckptengine.demo.train", "--dir", str(directory), "--root", run, "--run", run]
    log = (directory / f"{run}.log").open("ab")
    processes = _start_ranks(command + arguments, ranks, log)
    started_s = time.monotonic()
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        text = line.decode().strip()
        if text.startswith("start ") or (text.startswith("step ") and int(text.split()[1]) % 10 == 0):
            say(f"       {text}")
    status = _end(processes)
    log.close()
    say(f"       ended with {_status_text(status)} after {time.monotonic() - started_s:.1f} s")
    return status


def _start_ranks(command: list[str], ranks: int, log: Any) -> list[subprocess.Popen[bytes]]:
    port = _free_port()
    return [
        subprocess.Popen(
            command,
            env=_environment(rank, ranks, port),
            stdout=subprocess.PIPE if rank == 0 else log,
            stderr=log,
        )
        for rank in range(ranks)
    ]


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in place.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one was killed the others are killed too, as a job's launcher would."""
    while all(process.poll() is None for process in processes):
        time.sleep(0.02)
    if any(process.poll() not in (None, 0) for process in processes):
        for process in processes:
            process.kill()
    statuses = [process.wait() for process in processes]
    return next((status for status in statuses if status != 0), 0)


def _expect(status: int, wanted: int, directory: Path) -> None:
    if status != wanted:
        raise CheckpointError(
            f"a training run ended with {_status_text(status)} instead of {_status_text(wanted)}; "
            f"see the logs in {directory}"
        )


def _status_text(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def read_run(directory: Path, run: str, ranks: int) -> Run:
    """The losses of all ranks (joined, in rank order) and the saves of rank 0; of a step done twice the last counts."""
    losses: dict[int, str] = {}
    for rank in range(ranks):
        mine: dict[int, str] = {}
        for line in (directory / f"losses-{run}-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            mine[entry["step"]] = entry["loss"]
        for step, loss in mine.items():
            losses[step] = f"{losses[step]} {loss}" if step in losses else loss
    saves = [json.loads(line) for line in (directory / f"saves-{run}-0.jsonl").read_text().splitlines()]
    return Run(losses, saves)


def _compare(directory: Path, ranks: int, killed_at: int, resumed_from: int) -> Story:
    straight, resumed = read_run(directory, "straight", ranks), read_run(directory, "resumed", ranks)
    finals = [json.loads((directory / f"final-{run}.json").read_text()) for run in ("straight", "resumed")]
    names = sorted(set(finals[0]) | set(finals[1]))
    differing = [name for name in names if finals[0].get(name) != finals[1].get(name)]
    steps = sorted(set(straight.losses) | set(resumed.losses))
    differing_losses = [step for step in steps if straight.losses.get(step) != resumed.losses.get(step)]
    return Story(straight, resumed, killed_at, resumed_from, differing, differing_losses)
