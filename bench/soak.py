"""Long runs that are no part of the fast tests.

    python -m bench.soak kills --kills 50      random SIGKILLs: the resumed run ends with the same bits
    python -m bench.soak saves --saves 1000    saves in a row: memory, descriptors and threads stay flat
    python -m bench.soak ranks                 every fault at every operation of either of two ranks (in one process)

Each prints a JSON summary and exits with 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptengine as ce

STEPS = 60
CYCLES_PER_ROUND = 100


def training() -> tuple[dict[str, Any], nn.Module, torch.optim.Optimizer, Any]:
    """A small model with dropout (random numbers matter), AdamW and a schedule."""
    random.seed(5)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    return {"model": model, "optim": optimizer, "sched": schedule, "seen": [0.0]}, model, optimizer, schedule


def one_step(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    data = torch.randn(16, 64) + random.random()
    loss = model(data).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    state["seen"][0] += float(loss.detach())


def digest_of(state: dict[str, Any]) -> str:
    """Of every bit that training has made."""
    found = hashlib.sha256(repr(state["seen"]).encode())
    for name, value in sorted(state["model"].state_dict().items()):
        found.update(name.encode() + value.numpy().tobytes())
    for values in state["optim"].state.values():
        for name, value in sorted(values.items()):
            found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def run_life(root: Path, ready: int) -> str:
    """One life of a job: restore, train to the end with a save at every step; the digest.  ``ready``: a pipe."""
    state, *rest = training()
    with ce.Checkpointer(state, root) as checkpointer:
        start = checkpointer.restore() or 0
        os.write(ready, b"r")
        for step in range(start + 1, STEPS + 1):
            one_step(state, *rest)
            checkpointer.save(step)
    return digest_of(state)


def forked_life(root: Path, kill_after_s: float | None) -> tuple[bool, str]:
    """A life in a child process, killed so long after it restored: whether it was killed, and its digest."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, run_life(root, writing).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writing, f"failed: {type(error).__name__}: {error}".encode()[:4000])
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        first = pipe.read(1)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        told = (first + pipe.read()).removeprefix("r")
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status), told


def soak_kills(kills: int, seed: int) -> dict[str, Any]:
    """Kill a job at random moments until it has died ``kills`` times; runs that reach their end are compared."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        ce.Checkpointer  # noqa: B018 - imported here, so that kills hit saves and not imports
        started_s = time.monotonic()
        expected = forked_life(Path(folder) / "whole", None)[1]
        whole_s = time.monotonic() - started_s
        died, runs, lost = 0, 0, 0
        wrong: list[str] = []
        while died < kills:
            root = Path(folder) / f"run{runs}"
            known = 0
            for _ in range(40):
                killed, told = forked_life(root, dice.uniform(0, whole_s / 4))
                died += killed
                there = ce.steps(root)
                lost += bool(there) and there[-1] < known
                known = there[-1] if there else known
                if not killed:
                    break
            else:
                killed, told = forked_life(root, None)
            runs += 1
            if told != expected:
                wrong.append(told)
    good = not wrong and not lost
    return {"kills": died, "runs": runs, "differ": len(wrong), "lost": lost, "first": wrong[:3], "good": good}


def soak_saves(saves: int) -> dict[str, Any]:
    """Saves in a row; resident memory, descriptors and threads after every hundred."""
    memory_bytes, descriptors, threads = [], [], []
    page = os.sysconf("SC_PAGE_SIZE")
    with tempfile.TemporaryDirectory() as folder:
        state, *rest = training()
        with ce.Checkpointer(state, folder) as checkpointer:
            for number in range(1, saves + 1):
                one_step(state, *rest)
                checkpointer.save(number)
                if number % CYCLES_PER_ROUND == 0:
                    checkpointer.wait()
                    memory_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
                    descriptors.append(len(os.listdir("/proc/self/fd")))
                    threads.append(threading.active_count())
        committed = len(ce.steps(folder))
    grown = memory_bytes[-1] - memory_bytes[0]
    good = committed == saves and len(set(descriptors)) == 1 and len(set(threads)) == 1 and grown < 16 << 20
    return {
        "saves": saves, "committed": committed, "memory_mib": [round(one / 2**20, 1) for one in memory_bytes],
        "descriptors": descriptors, "threads": threads, "good": good,
    }  # fmt: skip


def soak_ranks() -> dict[str, Any]:
    """The two-rank sweep of the tests with every kind of fault."""
    folder = Path(__file__).parents[1] / "tests" / "faults"
    tests = [str(folder / name) for name in ("test_two_ranks.py", "test_real_ranks.py")]
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    ran = subprocess.run(command, env={**os.environ, "CKPTENGINE_ALL_FAULTS": "1"}, capture_output=True, text=True)
    return {"summary": ran.stdout.strip().splitlines()[-1:], "good": ran.returncode == 0}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "saves", "ranks"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--saves", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.getLogger("ckptengine").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    if options.what == "kills":
        summary = soak_kills(options.kills, options.seed)
    elif options.what == "saves":
        summary = soak_saves(options.saves)
    else:
        summary = soak_ranks()
    print(json.dumps(summary, indent=2))
    return 0 if summary["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
