"""`restore`: filling a live training state from a checkpoint of the same layout, page cache cold and warm.

Every engine fills the same, already touched, tensors; the clock stops when every byte is in place.  Before each
restore the tensors are scrambled, after it they are compared.  The raw direct read of as many bytes is interleaved.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..disk import BLOCK_BYTES, aligned_buffer, read_file, write_file
from ..durability import count, evict, make_durable, warm
from ..engine import Engine
from ..loop import Trainer
from ..options import Job
from ..rivals import engine_class
from ..state import differences, gpt_state

STEP = 1


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in seconds and bytes."""
    state = gpt_state(job.size, job.state_bytes, job.device, job.seed)
    trainer = Trainer(state, 2)
    trainer.step(0, None)
    root = Path(job.directory)
    limit = root / "limit.bin"
    write_file(limit, state.size_bytes, aligned_buffer(BLOCK_BYTES))
    engine = engine_class(job.engine)(root, state)
    expected = state.digests() if engine.checked else {}
    try:
        wait = engine.save(STEP)
        engine.drain()  # first: some engines finish their saves here, on this thread
        wait()
        make_durable(engine.path(STEP))
        size_bytes, files = count(engine.path(STEP))
        restores = []
        for _ in range(job.saves):
            evict(limit)
            limit_s = read_file(limit)
            evict(engine.path(STEP))
            cold = timed(engine, expected)
            warm(engine.path(STEP))
            restores.append({"limit_s": limit_s, "cold": cold, "warm": timed(engine, expected)})
    finally:
        engine.close()
    return {
        "state_bytes": state.size_bytes,
        "bytes_on_disk": size_bytes,
        "files": files,
        "restores": restores,
    }


def timed(engine: Engine, expected: dict[str, str]) -> dict[str, Any]:
    """One restore over scrambled tensors: seconds, and the check."""
    engine.state.scramble()
    start = time.perf_counter()
    engine.restore(STEP)
    engine.state.settle()
    seconds = time.perf_counter() - start
    if not engine.checked:
        return {"seconds": seconds, "check": "not a checkpoint"}
    wrong = differences(expected, engine.state.digests())
    return {"seconds": seconds, "check": f"WRONG BYTES in {len(wrong)} tensors" if wrong else "ok"}
