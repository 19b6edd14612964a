"""Runs jobs, each in a process of its own, interleaved so that drift of the machine hits all engines alike."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .names import BASELINE, ENGINES, LIMIT, RESHARDING
from .nursery import Nursery, run_fresh
from .options import Job, Options, job

Progress = Callable[[str], None]

ENGINELESS = ("disk",)
"""Workloads that measure the machine, not an engine."""

ONLY = {
    "metadata": ("ckptengine", "dcp-save"),
    "reshard": RESHARDING,
    "convert": ("pwrite", "ckptengine", "dcp-save", "deepspeed-fast"),
}
"""Workloads that only some engines can be measured with."""

WITH_BASELINE = ("stall", "memory")
WITH_LIMIT = ("stall", "durable", "restore", "convert")
"""Workloads in which no checkpoint at all, and the raw limit, mean something."""

ONCE = ("disk", "memory", "reshard", "convert", "metadata", "many-small")
"""Workloads that take their samples within one process, where no number of repetitions is asked for."""

FRESH = ("memory",)
"""Workloads whose process must not share memory with the one that it was forked from."""

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One job and what came of it."""

    job: Job
    result: dict[str, Any]
    wall_s: float
    cpu_s: float = 0.0
    """Of the process and of those of its children that it waited for."""

    def to_json(self) -> dict[str, Any]:
        """Everything, without the machine's own paths."""
        described = {name: value for name, value in self.job.to_json().items() if name != "directory"}
        return {"job": described, "result": self.result, "wall_s": self.wall_s, "cpu_s": self.cpu_s}


def engines_for(options: Options, workload: str) -> tuple[str, ...]:
    """The engines that a workload is measured with."""
    if workload in ENGINELESS:
        return ("",)
    meaningless = {name for name, where in ((BASELINE, WITH_BASELINE), (LIMIT, WITH_LIMIT)) if workload not in where}
    engines = options.engines or tuple(ENGINES)
    return tuple(name for name in ONLY.get(workload, engines) if name in engines and name not in meaningless)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, starting elsewhere: over the repetitions no engine always follows the same one's start."""
    shift = (by * max(1, len(names) // 3)) % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if by % 2 else turned


def plan(options: Options, directory: str) -> Iterator[Job]:
    """Every job in the order in which it runs: repetition by repetition, all workloads and engines in each."""
    for repetition in range(options.repetitions or options.preset.repetitions):
        for workload in options.workloads:
            if repetition and workload in ONCE and options.repetitions is None:
                continue
            for threads in options.thread_counts():
                for engine in rotated(engines_for(options, workload), repetition):
                    yield job(
                        options, workload, engine, directory, repetition=repetition, threads=threads,
                        ranks=options.ranks[0], target_ranks=options.ranks[-1],
                    )  # fmt: skip


def remaining_s(todo: Sequence[Job], samples: Sequence[Sample]) -> float:
    """What the jobs may still take: as long as those of the same workload have taken, or else as all have."""
    took: dict[str, list[float]] = {}
    for sample in samples:
        if sample.result["status"] == "ok":
            took.setdefault(sample.job.workload, []).append(sample.wall_s)
    every = [seconds for times in took.values() for seconds in times] or [0.0]
    return sum(statistics.fmean(took.get(one.workload, every)) for one in todo)


def run_all(
    options: Options, progress: Progress, done: Mapping[str, Sample] | None = None,
    keep: Callable[[Sample], None] = lambda sample: None, key: Callable[[Job], str] = repr,
) -> list[Sample]:  # fmt: skip
    """Run every job of the options that is not among those `done` (by `key`); each sample is given to `keep` at once.

    An engine that was skipped once is not started again for the same workload.  When the options' time limit is over
    no further job is started, and those that are left say so.
    """
    found = dict(done or {})
    samples: list[Sample] = []
    skipped: dict[tuple[str, str], dict[str, Any]] = {}
    spent_s = sum(sample.wall_s for sample in found.values())
    begun, limit_s = time.monotonic(), options.limit_s
    with tempfile.TemporaryDirectory(prefix="ckptengine-bench-", dir=options.directory) as directory, \
            Nursery(worker_environment()) as nursery:  # fmt: skip
        jobs = list(plan(options, directory))
        for number, todo in enumerate(jobs, 1):
            known = found.get(key(todo))
            over = limit_s is not None and spent_s + time.monotonic() - begun > limit_s
            if known is not None:
                sample = known
            elif (todo.workload, todo.engine) in skipped:
                sample = Sample(todo, skipped[todo.workload, todo.engine], 0.0)
            elif over:
                limit = f"not run: the time limit of {(limit_s or 0) / 60:g} minutes was over"
                sample = Sample(todo, {"status": "skipped", "reason": limit}, 0.0)
            else:
                sample = run_one(todo, Path(directory) / f"job-{number}", nursery)
                keep(sample)
                left_s = remaining_s([one for one in jobs[number:] if (one.workload, one.engine) not in skipped
                                      and key(one) not in found], [*samples, sample])  # fmt: skip
                progress(line_about(sample, number, len(jobs), left_s))
            samples.append(sample)
            if sample.result["status"] == "skipped" and not over:
                skipped[todo.workload, todo.engine] = sample.result
    return samples


def line_about(sample: Sample, number: int, jobs: int, left_s: float) -> str:
    """Which job of how many it was, what it took and came to, and what is expected to be left."""
    label = " ".join(filter(None, (sample.job.workload, sample.job.engine)))
    came_to = sample.result["status"]
    if came_to != "ok":
        came_to += f": {sample.result['reason']}"
    return (
        f"[{number}/{jobs}] {label}, {sample.job.threads} thread(s), repetition {sample.job.repetition + 1}: "
        f"{sample.wall_s:.1f} s ({sample.cpu_s:.1f} s of CPU), {came_to}; about {left_s / 60:.1f} min left"
    )


def run_one(todo: Job, folder: Path, nursery: Nursery | None = None) -> Sample:
    """Run a job in a process of its own, in a fresh directory that is removed afterwards."""
    root = folder / "root"
    root.mkdir(parents=True)
    described = dataclasses.replace(todo, directory=str(root))
    (folder / "job.json").write_text(json.dumps(described.to_json()))
    start = time.monotonic()
    if nursery is None or todo.workload in FRESH:
        ended = run_fresh(folder, todo.timeout_s, worker_environment())
    else:
        ended = nursery.run(folder, todo.timeout_s)
    wall_s = time.monotonic() - start
    result_file = folder / "result.json"
    if result_file.exists():
        result = json.loads(result_file.read_text())
    else:
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        why = f"cut off after {todo.timeout_s:.0f} s" if ended.cut_off else f"exit status {ended.status}"
        result = {"status": "failed", "reason": f"{why}; {tail[0][:300]}"}
    shutil.rmtree(folder, ignore_errors=True)
    return Sample(todo, result, round(wall_s, 3), round(ended.cpu_s, 3))


def worker_environment() -> dict[str, str]:
    """The environment with this package findable, whatever the current directory is."""
    environment = dict(os.environ)
    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = PACKAGE_PARENT + (os.pathsep + known if known else "")
    return environment
