"""A job with three tiers is killed at random moments, again and again: ``python -m bench.kills --kills 200``.

One kill in four comes at any moment from the start of the job, the others at any moment after it has restored.
After each kill every checkpoint that was acknowledged as durable, and that retention has not dropped since, must
restore bit-identical from the root alone; the next job must go on from the newest step that any tier has.  At the end
``prune`` must leave nothing but the newest checkpoint on each tier.  Exit status 1 when anything else is found.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import random
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.cli import main as command
from ckptengine.tiers.memory import SHARED_MEMORY

from .machine import facts

for _module in ("api", "checkpointer", "cli.prune"):
    importlib.import_module(f"ckptengine.{_module}")  # so that forked jobs have nothing to load

KEPT = 3
EVERY = (1, 2, 4)
"""Steps between checkpoints on host memory, on the disk and on the root."""
OPENING_S = 60.0
"""How long a job may take until it has restored, on a loaded machine."""
DISK_BYTES_PER_S = 40e6
"""A cap, so that many kills come in the middle of a drain."""


def state_of(step: int, size: int) -> dict[str, Any]:
    """A state whose every element follows from the step."""
    return {"a": torch.arange(size) * 1009 + step, "b": torch.arange(3) - step, "note": {"step": step}}


def is_exactly(state: dict[str, Any], step: int, size: int) -> bool:
    wanted = state_of(step, size)
    return all(torch.equal(state[name], wanted[name]) for name in "ab") and bool(state["note"] == wanted["note"])


def train(places: list[str], size: int, out: int) -> None:
    """The job: goes on from the newest checkpoint, and tells ``out`` what was acknowledged, until it is killed."""
    torch.set_num_threads(1)
    state = state_of(0, size)
    tiers = [
        ce.Tier(places[0], interval=ce.Every(steps=EVERY[0])),
        ce.Tier(places[1], interval=ce.Every(steps=EVERY[1]), max_bytes_per_s=DISK_BYTES_PER_S),
    ]
    with ce.Checkpointer(
        state, places[-1], tiers=tiers, interval=ce.Every(steps=EVERY[-1]), keep=ce.Keep(last=KEPT), random=False
    ) as checkpointer:
        start = checkpointer.restore() or 0
        exact = is_exactly(state, start, size)
        os.write(out, f"{'restored' if exact else 'wrong'} {start}\n".encode())
        step = start
        while True:
            step += 1
            time.sleep(0.005)
            checkpointer.fence()
            fresh = state_of(step, size)
            state["a"].copy_(fresh["a"])
            state["b"].copy_(fresh["b"])
            state["note"]["step"] = step
            handle = checkpointer.step(step)
            if handle is not None:
                handle.add_done_callback(lambda h: os.write(out, f"{h.stage} {h.step}\n".encode()))


def in_child(
    work: Callable[[int], None], *, kill_after_s: float | None = None, from_restored: bool = False
) -> tuple[list[str], int]:
    """What ``work`` tells in a process of its own, and its exit status; killed after a while if asked to.

    ``from_restored``: counted from the first thing that it tells, not from its start.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work(writing)
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(status)
    os.close(writing)
    if kill_after_s is not None:
        if from_restored:
            select.select([reading], [], [], OPENING_S)
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as told:
        lines = told.read().splitlines()
    return lines, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def check(places: list[str], size: int, acknowledged: int, out: int) -> None:
    """Every step of every tier restores exactly, and the newest acknowledged one is on the root."""
    steps = ce.steps(places[-1])
    if acknowledged and acknowledged not in steps and not (steps and steps[-1] > acknowledged):
        os.write(out, f"step {acknowledged} was acknowledged and the root has {steps}\n".encode())
    for place in places:
        for step in ce.steps(place):
            state = state_of(0, size)
            try:
                found = ce.load(state, place, step)
            except ce.CheckpointError as error:
                os.write(out, f"{place}: step {step}: {error}\n".encode())
                continue
            if found != step or not is_exactly(state, step, size):
                os.write(out, f"{place}: step {step} differs\n".encode())
    newest = max((step for place in places for step in ce.steps(place)), default=0)
    os.write(out, f"newest {newest}\n".encode())


def left_over(place: str) -> list[str]:
    """What lies on a tier after ``prune`` beside its newest checkpoint, records of attempts, and the lock."""
    steps = ce.steps(place)
    found = [str(path.relative_to(place)) for path in Path(place).rglob("*") if path.is_file()]
    wanted = f"step-{steps[-1]:09d}/" if steps else "no step"
    ours = [name for name in found if name.startswith(wanted) and "/." not in name]
    known = {*ours, ".lock", ".policy.json"}
    strange = [name for name in found if name not in known and not name.startswith("attempts/")]
    return strange + (ours if len(ours) != 2 else [])


def prune(places: list[str], out: int) -> None:
    for place in places:
        if not ce.steps(place):
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            status = command(["prune", place, "--keep-last", "1"])
        if status:
            os.write(out, f"prune of {place} failed\n".encode())
        for name in left_over(place):
            os.write(out, f"{place}: {name} is left over\n".encode())


def run(kills: int, size: int, longest_s: float, seed: int, folder: Path) -> dict[str, Any]:
    """Kill ``kills`` times; what was found, as JSON."""
    name = f"kills-{secrets.token_hex(6)}"
    memory = SHARED_MEMORY / f"ckptengine-{os.getuid()}" / name
    jobs = [f"shm://{name}", str(folder / "disk"), str(folder / "root")]
    looks = [str(memory), *jobs[1:]]
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    problems: list[str] = []
    newest = there = 0
    began_s = time.monotonic()
    try:
        for number in range(kills):
            after_s = chance.uniform(0.0, longest_s)
            opened = number % 4 != 0  # the others may die while they open and restore
            told, status = in_child(lambda out: train(jobs, size, out), kill_after_s=after_s, from_restored=opened)
            if status != -signal.SIGKILL:
                problems.append(f"the job ended by itself with status {status}")
            for line in told:
                what, step = line.split()
                counts[what] += 1
                if what == "restored" and int(step) != there:
                    problems.append(f"the job went on from step {step}, step {there} was there")
                if what in ("wrong", "failed"):
                    problems.append(f"{what} at step {step}")
                if what == "durable":
                    newest = max(newest, int(step))
            for place in looks:
                counts["killed in a drain"] += any(Path(place).glob("step-*/.partial-*"))
            acknowledged = newest
            found, status = in_child(lambda out, at=acknowledged: check(looks, size, at, out))  # type: ignore[misc]
            there = int(found.pop().split()[1]) if found and found[-1].startswith("newest") else -1
            problems += found + ([f"the check ended with status {status}"] if status else [])
        found, status = in_child(lambda out: prune(looks, out))
        problems += found + ([f"the prune ended with status {status}"] if status else [])
    finally:
        shutil.rmtree(memory, ignore_errors=True)
    return {
        "schema": 1,
        "levels": "kills",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts(folder),
        "seconds": round(time.monotonic() - began_s, 1),
        "figures": {
            "kills": kills,
            "seed": seed,
            "size_bytes": 8 * size,
            "newest_durable": newest,
            "counts": dict(sorted(counts.items())),
            "problems": problems,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--elements", type=int, default=200_000, help="size of the state, 8 bytes each")
    parser.add_argument("--longest", type=float, default=2.5, metavar="S", help="a job lives up to this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptengine-kills-") as folder:
        document = run(options.kills, options.elements, options.longest, options.seed, Path(folder))
    text = json.dumps(document, indent=1)
    if options.json:
        Path(options.json).write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 1 if document["figures"]["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
