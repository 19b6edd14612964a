"""Runs jobs, each in a process of its own, interleaved so that drift of the machine hits all engines alike."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .names import BASELINE, ENGINES, LIMIT, RESHARDING
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

PACKAGE_PARENT = str(Path(__file__).resolve().parent.parent)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One job and what came of it."""

    job: Job
    result: dict[str, Any]
    wall_s: float

    def to_json(self) -> dict[str, Any]:
        """Everything, without the machine's own paths."""
        described = {name: value for name, value in self.job.to_json().items() if name != "directory"}
        return {"job": described, "result": self.result, "wall_s": self.wall_s}


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
    """Every job in the order in which it runs: repetition by repetition, all engines in each."""
    for workload in options.workloads:
        repetitions = options.repetitions or (1 if workload in ("disk", "memory") else options.preset.repetitions)
        for repetition in range(repetitions):
            for threads in options.thread_counts():
                for engine in rotated(engines_for(options, workload), repetition):
                    yield job(
                        options, workload, engine, directory, repetition=repetition, threads=threads,
                        ranks=options.ranks[0], target_ranks=options.ranks[-1],
                    )  # fmt: skip


def run_all(options: Options, progress: Progress) -> list[Sample]:
    """Run every job of the options; an engine that was skipped once is not started again for the same workload."""
    samples: list[Sample] = []
    skipped: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ckptengine-bench-", dir=options.directory) as directory:
        jobs = list(plan(options, directory))
        for number, todo in enumerate(jobs, 1):
            known = skipped.get((todo.workload, todo.engine))
            if known is not None:
                samples.append(Sample(todo, known, 0.0))
                continue
            label = f"{todo.workload} {todo.engine}".strip()
            progress(f"[{number}/{len(jobs)}] {label}, repetition {todo.repetition + 1}")
            sample = run_one(todo, Path(directory) / f"job-{number}")
            samples.append(sample)
            if sample.result["status"] != "ok":
                progress(f"    {sample.result['status']}: {sample.result['reason']}")
            if sample.result["status"] == "skipped":
                skipped[todo.workload, todo.engine] = sample.result
    return samples


def run_one(todo: Job, folder: Path) -> Sample:
    """Run a job in a fresh process, in a fresh directory that is removed afterwards."""
    root = folder / "root"
    root.mkdir(parents=True)
    todo = dataclasses.replace(todo, directory=str(root))
    job_file, result_file, log_file = folder / "job.json", folder / "result.json", folder / "log.txt"
    job_file.write_text(json.dumps(todo.to_json()))
    start = time.monotonic()
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", str(job_file), str(result_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=worker_environment(),
            start_new_session=True,
        )
        reason = _finish(process, todo.timeout_s)
    wall_s = time.monotonic() - start
    if result_file.exists():
        result = json.loads(result_file.read_text())
    else:
        tail = log_file.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        result = {"status": "failed", "reason": f"{reason or f'exit status {process.returncode}'}; {tail[0][:300]}"}
    shutil.rmtree(folder, ignore_errors=True)
    return Sample(todo, result, wall_s)


def _finish(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Wait for the job; then end whatever of its process group is left.  Says why where it was cut off."""
    reason = ""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        reason = f"cut off after {timeout_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return reason


def worker_environment() -> dict[str, str]:
    """The environment with this package findable, whatever the current directory is."""
    environment = dict(os.environ)
    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = PACKAGE_PARENT + (os.pathsep + known if known else "")
    return environment
