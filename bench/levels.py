"""What tiers bring and take: ``python -m bench.levels restore`` and ``python -m bench.levels stolen``.

``restore``: the same checkpoint from host memory and from the local disk behind it (out of the page cache), in turns.
``stolen``: the time of a training step while a drain runs and while none does, in turns.  Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.tiers.memory import SHARED_MEMORY

PARTS = 16


def state_of(size_bytes: int) -> dict[str, Any]:
    count = size_bytes // 8 // PARTS
    return {f"t{number}": torch.arange(count) * (number + 1) for number in range(PARTS)}


def forget(folder: Path) -> None:
    """Out of the page cache with every file beneath ``folder``."""
    for path in folder.rglob("*.bin"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def timed(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def restored(state: dict[str, Any], root: Path, tiers: list[ce.Tier]) -> float:
    """Seconds of one restore by a checkpointer that is open already; the state must come out as it was."""
    for tensor in state.values():
        tensor.zero_()
    with ce.Checkpointer(state, root, tiers=tiers, random=False) as checkpointer:
        took_s = timed(checkpointer.restore)
    wanted = state_of(sum(tensor.nbytes for tensor in state.values()))
    if not all(torch.equal(state[name], wanted[name]) for name in wanted):
        raise SystemExit("what was restored differs from what was saved")
    return took_s


def measure_restore(size_bytes: int, rounds: int, folder: Path, memory: str) -> dict[str, Any]:
    root, tier = folder / "root", ce.Tier(memory)
    state = state_of(size_bytes)
    ce.save(state, root, 1, tiers=[tier])
    from_memory, from_disk = [], []
    for _ in range(rounds):
        from_memory.append(restored(state, root, [tier]))
        forget(root)
        from_disk.append(restored(state, root, []))
    memory_s, disk_s = statistics.median(from_memory), statistics.median(from_disk)
    return {
        "size_bytes": size_bytes,
        "memory_s": from_memory,
        "disk_s": from_disk,
        "memory_bytes_per_s": size_bytes / memory_s,
        "disk_bytes_per_s": size_bytes / disk_s,
        "times_faster": disk_s / memory_s,
    }


def measure_stolen(size_bytes: int, rounds: int, folder: Path, memory: str) -> dict[str, Any]:
    """Each round: steps while nothing runs, then steps while one checkpoint is carried from memory to the disk."""
    torch.set_num_threads(1)
    state = state_of(size_bytes)
    a = torch.randn(384, 384)

    def step() -> float:
        return timed(lambda: [a @ a for _ in range(4)])

    idle: list[float] = []
    busy: list[float] = []
    drains: list[float] = []
    with ce.Checkpointer(state, folder / "root", tiers=[ce.Tier(memory)], random=False) as checkpointer:
        for number in range(rounds):
            handle = checkpointer.save(number)
            handle.wait("captured")
            while not handle.done():  # on its way from memory to the disk
                busy.append(step())
            drains.append(handle.counters["durable_s"] - handle.counters["captured_s"])
            began_s = time.perf_counter()
            while time.perf_counter() - began_s < drains[-1]:
                idle.append(step())
    idle_s, busy_s = statistics.median(idle), statistics.median(busy)
    return {
        "size_bytes": size_bytes,
        "steps": [len(idle), len(busy)],
        "step_idle_s": idle_s,
        "step_draining_s": busy_s,
        "drain_s": statistics.median(drains),
        "slower_while_draining": busy_s / idle_s - 1,
        "seconds_stolen_by_a_drain": (busy_s / idle_s - 1) * statistics.median(drains),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("restore", "stolen"))
    parser.add_argument("--size", type=int, default=1 << 30, metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    name = f"bench-{secrets.token_hex(6)}"
    measure = measure_restore if options.what == "restore" else measure_stolen
    try:
        with tempfile.TemporaryDirectory(prefix="ckptengine-levels-") as folder:
            found = measure(options.size, options.rounds, Path(folder), f"shm://{name}")
    finally:
        shutil.rmtree(SHARED_MEMORY / f"ckptengine-{os.getuid()}" / name, ignore_errors=True)
    document = {**found, "cores": os.cpu_count(), "load": os.getloadavg()}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
