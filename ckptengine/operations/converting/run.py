"""Carry out a planned conversion: units on threads within a bound of memory, then what names them all."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ckptengine.errors import Damaged
from ckptengine.operations.converting.plan import Planned, file_versions
from ckptengine.operations.converting.workspace import Workspace
from ckptengine.operations.digests import Seen, combine, compare
from ckptengine.sources import buffers
from ckptengine.sources.writer import Document, Job, Unit, WritesFile
from ckptengine.state.collection import no_collection

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), by one thread at a time."""

Outcome = tuple[int, dict[str, str]]
"""(tensors compared with the source's digests, digests of all tensors)."""


def run_units(planned: Planned, workspace: Workspace, units: Sequence[Unit], progress: Progress | None) -> None:
    """Write what is not recorded yet, the largest first, within the bound of memory."""
    done = workspace.done()
    total = sum(unit.read_bytes for unit in units)
    meter = _Meter(progress, total, sum(unit.read_bytes for unit in units if unit.key in done))
    left = sorted((unit for unit in units if unit.key not in done), key=lambda unit: -unit.read_bytes)
    budget = _Budget(planned.memory_bytes)
    stopped = threading.Event()

    def work(unit: Unit) -> None:
        if stopped.is_set():
            return
        with budget.take(unit.memory_bytes):
            write_unit(planned, workspace, unit, meter.add)

    try:
        with ThreadPoolExecutor(planned.plan.workers, thread_name_prefix="ckptengine-convert") as pool:
            futures = [pool.submit(work, unit) for unit in left]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stopped.set()
    finally:
        buffers.clear()
    for future in futures:
        future.result()


def write_unit(planned: Planned, workspace: Workspace, unit: Unit, progress: Callable[[int], None]) -> None:
    """Write one unit and record it with the digests of what it read."""
    seen = Seen(planned.job, progress)
    job: Job = dataclasses.replace(planned.job, read=seen.read, read_many=seen.read_many)
    result = planned.writer.write(job, unit, workspace.target)
    workspace.record(unit.key, {"result": result, "seen": seen.to_json(), "files": list(unit.files)})


def finish(planned: Planned, workspace: Workspace, target_name: str) -> Outcome | None:
    """Compare digests, write what names all units and commit, once every unit is recorded."""
    with no_collection(), workspace.finishing() as mine:
        if not mine:
            return None
        records = workspace.done()
        if any(unit.key not in records for unit in planned.units):
            return None
        wanted: list[Document] = [records[unit.key] for unit in planned.units]
        digests = combine(planned.job, (record["seen"] for record in wanted))
        compared = compare(planned.job, digests, planned.plan.source)
        _check_unchanged(planned)
        job = dataclasses.replace(planned.job, digests=digests)
        results = {unit.key: records[unit.key]["result"] for unit in planned.units}
        planned.writer.finish(job, results, workspace.target)
        single = planned.writer.file(target_name) if isinstance(planned.writer, WritesFile) else None
        workspace.commit(single)
        return compared, digests


def _check_unchanged(planned: Planned) -> None:
    """`Damaged` where a file of the source was written after the conversion was planned."""
    now = file_versions(planned.source, planned.versions)
    changed = sorted(file for file, version in now.items() if version != planned.versions[file])
    if changed:
        raise Damaged(
            f"{planned.plan.source}: {changed[0]} was changed while it was converted"
            + (f", and {len(changed) - 1} more files" if len(changed) > 1 else "")
            + "; nothing was kept, convert again when nothing writes to it"
        )


class _Meter:
    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self._progress, self._total, self._done = progress, total, done
        self._lock = threading.Lock()
        self.add(0)

    def add(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


class _Budget:
    """Memory that units take while they run; one that is larger than what is left waits."""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> _Taken:
        with self._changed:
            self._changed.wait_for(lambda: self._left >= nbytes)
            self._left -= nbytes
        return _Taken(self, nbytes)

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._left += nbytes
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Taken:
    budget: _Budget
    nbytes: int

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.budget.give(self.nbytes)
