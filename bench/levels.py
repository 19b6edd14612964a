"""What tiers bring and take: ``python -m bench.levels restore``, ``stolen`` or ``memory``.

``restore``: the same checkpoint from host memory and from the local disk behind it (out of the page cache), in turns.
``stolen``: the time of a training step while a drain runs and while none does, in turns.
``memory``: what a save and its way from the local disk to an S3 server take of the process's memory.
Prints JSON, and writes it where ``--json`` says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckptengine as ce
from ckptengine.tiers.memory import SHARED_MEMORY

from .machine import facts
from .object_server import object_server

PARTS = 16
DRAIN_EVERY_S = 60.0
"""How often a job is taken to carry a checkpoint on, for the share of its time that drains steal."""
SCHEMA = 1
FLOORS: dict[str, dict[str, tuple[str, float]]] = {
    "restore": {"times_faster": (">=", 3.0)},
    "stolen": {"stolen_fraction": ("<=", 0.01)},
    "memory": {"above_baseline_bytes": ("<=", 256 << 20)},
}
"""What each measurement is held against."""


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

    every_s = DRAIN_EVERY_S
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
    idle_s, busy_s, drain_s = statistics.median(idle), statistics.median(busy), statistics.median(drains)
    return {
        "size_bytes": size_bytes,
        "steps": [len(idle), len(busy)],
        "step_idle_s": idle_s,
        "step_draining_s": busy_s,
        "drain_s": drain_s,
        "slower_while_draining": busy_s / idle_s - 1,
        "seconds_stolen_by_a_drain": (busy_s / idle_s - 1) * drain_s,
        "every_s": every_s,
        "stolen_fraction": (busy_s / idle_s - 1) * drain_s / max(every_s, drain_s),
    }


class Watch:
    """Resident memory of this process, anonymous and shared pages, looked at every 10 ms; files' pages are the
    kernel's to drop."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._look, daemon=True)

    @staticmethod
    def now_bytes() -> int:
        found = 0
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                found += int(line.split()[1]) << 10
        return found

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, self.now_bytes())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_memory(size_bytes: int, rounds: int, folder: Path, memory: str) -> dict[str, Any]:
    """Above what the process holds before its first save: while it saves to the disk, and while that goes to S3."""
    del memory  # the first tier is the disk
    state = state_of(size_bytes)
    saving, draining, took_s = [], [], []
    with object_server(folder) as (url, options, server):
        user = {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
        os.environ.update(user, AWS_ENDPOINT_URL=options["endpoint_url"])
        with ce.Checkpointer(state, url, tiers=[ce.Tier(folder / "disk")], random=False) as checkpointer:
            baseline = Watch.now_bytes()
            for number in range(rounds):
                with Watch() as watch:
                    handle = checkpointer.save(number)
                    handle.wait("committed")
                saving.append(watch.peak_bytes - baseline)
                with Watch() as watch:
                    handle.result()
                draining.append(watch.peak_bytes - baseline)
                took_s.append(handle.counters["durable_s"] - handle.counters["committed_s"])
    return {
        "size_bytes": size_bytes,
        "server": server,
        "baseline_bytes": baseline,
        "saving_bytes": saving,
        "draining_bytes": draining,
        "above_baseline_bytes": max(saving + draining),
        "drain_bytes_per_s": size_bytes / statistics.median(took_s),
    }


MEASURES = {"restore": measure_restore, "stolen": measure_stolen, "memory": measure_memory}


def document_of(what: str, size_bytes: int, rounds: int) -> dict[str, Any]:
    """One measurement with what it is held against, the machine and the date."""
    name = f"bench-{secrets.token_hex(6)}"
    began_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="ckptengine-levels-") as folder:
            machine = facts(Path(folder))
            found = MEASURES[what](size_bytes, rounds, Path(folder), f"shm://{name}")
    finally:
        shutil.rmtree(SHARED_MEMORY / f"ckptengine-{os.getuid()}" / name, ignore_errors=True)
    held = {
        figure: {
            "floor": f"{sign} {bound:g}",
            "met": found[figure] >= bound if sign == ">=" else found[figure] <= bound,
        }
        for figure, (sign, bound) in FLOORS[what].items()
    }
    return {
        "schema": SCHEMA,
        "levels": what,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "seconds": round(time.monotonic() - began_s, 1),
        "figures": found,
        "floors": held,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=tuple(MEASURES))
    parser.add_argument("--size", type=int, default=1 << 30, metavar="BYTES")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    text = json.dumps(document_of(options.what, options.size, options.rounds), indent=1) + "\n"
    if options.json:
        Path(options.json).write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
