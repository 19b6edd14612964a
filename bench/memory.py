"""Host memory of a process and all its descendants: proportional set size, sampled from a process of its own.

Memory is anonymous and shared pages; pages of files, which the kernel takes back at will and whose share changes with
every other process that maps the same library, are counted apart.

Run as a module with the process's id: it prints a line after the first sample, and when its standard input closes a
JSON list of [seconds on the monotonic clock, bytes of memory, bytes of file pages].
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path


def children(process: int) -> list[int]:
    """Direct children of a process; none if it is gone."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{process}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            found += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
        except OSError:
            continue  # the thread ended meanwhile
    return found


def tree(process: int) -> list[int]:
    """A process and its descendants."""
    found = [process]
    for parent in found:
        found += [child for child in children(parent) if child not in found]
    return found


def pss_bytes(process: int) -> tuple[int, int]:
    """Proportional set size of one process: memory (swap included), and file pages; zeros if it is gone."""
    memory = files = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:", "SwapPss:")):
                memory += int(line.split()[1]) * 1024
            elif line.startswith("Pss_File:"):
                files += int(line.split()[1]) * 1024
    except OSError:
        return 0, 0
    return memory, files


def sample(process: int, interval_s: float) -> list[tuple[float, int, int]]:
    """Sample the tree of `process` (without this process) until standard input closes."""
    samples = []
    while True:
        members = [member for member in tree(process) if member != os.getpid()]
        sizes = [pss_bytes(member) for member in members]
        samples.append((time.monotonic(), sum(size[0] for size in sizes), sum(size[1] for size in sizes)))
        if len(samples) == 1:
            print("ready", flush=True)
        if select.select([sys.stdin], [], [], interval_s)[0]:
            return samples


class Sampler:
    """Watches this process's tree while the `with` block runs; then `samples` holds what it saw."""

    def __init__(self, interval_s: float = 0.02) -> None:
        self.interval_s = interval_s
        self.samples: list[tuple[float, int, int]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Sampler:
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(self.interval_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        output, _ignored = self._process.communicate("")
        self.samples = [(moment, memory, files) for moment, memory, files in json.loads(output)]

    def peak_bytes(self, since: float = 0.0) -> int:
        """The largest sample from `since` (monotonic seconds) on."""
        return max((memory for moment, memory, _ in self.samples if moment >= since), default=0)


if __name__ == "__main__":
    json.dump(sample(int(sys.argv[1]), float(sys.argv[2])), sys.stdout)
