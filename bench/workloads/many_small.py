"""`many-small`: a state of very many small tensors, where every cost per tensor shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..durability import count
from ..engine import Engine
from ..options import Job
from ..rivals import engine_class
from ..state import small_tensors
from .durable import change, one_save


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in seconds and bytes."""
    state = small_tensors(job.tensors)
    engine = engine_class(job.engine)(Path(job.directory), state)
    try:
        saves = []
        for step in range(1, job.saves + 2):
            change(state, engine)
            saves.append(one_save(engine, step, job.timeout_s))
        restore_s = timed_restore(engine, job)
    finally:
        engine.close()
    return {
        "state_bytes": state.size_bytes,
        "tensors": job.tensors,
        "first_save": saves[0],
        "saves": saves[1:],
        "restore_s": restore_s,
    }


def timed_restore(engine: Engine, job: Job) -> float:
    """Save once more and restore it, the page cache warm; seconds."""
    step = job.saves + 2
    wait = engine.save(step)
    engine.drain()  # first: some engines finish their saves here, on this thread
    wait()
    count(engine.path(step)) if engine.path(step).exists() else None
    start = time.perf_counter()
    engine.restore(step)
    engine.state.settle()
    seconds = time.perf_counter() - start
    engine.discard(step)
    return seconds
