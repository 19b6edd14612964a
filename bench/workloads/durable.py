"""`durable`: how long after the call a checkpoint survives a power cut, with nothing else going on.

Between two saves the same number of bytes is written by raw `pwrite`, in the same process, so that each figure has
its limits beside it: from one warm block, which is all that the device can do, and from as much memory as the state
takes, which is all that anybody can do who has to write a state.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..check import verify
from ..disk import BLOCK_BYTES, aligned_buffer, round_up, write_file
from ..durability import count
from ..engine import Engine
from ..loop import Save, Watch, clock
from ..options import Job
from ..rivals import engine_class
from ..state import TensorState, gpt_like_tensors


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in seconds and bytes."""
    state = gpt_like_tensors(job.size, job.state_bytes, job.device)
    root = Path(job.directory)
    engine = engine_class(job.engine)(root, state)
    limits = {
        "limit_s": aligned_buffer(BLOCK_BYTES),
        "limit_from_memory_s": aligned_buffer(round_up(state.size_bytes)),
    }
    try:
        saves = []
        for step in range(1, job.saves + 2):
            change(state, engine)
            seconds = {}
            for name, buffer in limits.items():
                seconds[name] = write_file(root / "limit.bin", state.size_bytes, buffer)
                (root / "limit.bin").unlink()
            saves.append({**one_save(engine, step, job.timeout_s), **seconds})
    finally:
        engine.close()
    return {"state_bytes": state.size_bytes, "tensors": len(state.named), "first_save": saves[0], "saves": saves[1:]}


def change(state: TensorState, engine: Engine) -> None:
    """What an update does between two saves, with the engine's fences around it."""
    engine.poll()
    engine.before_update()
    state.advance()
    engine.after_update()


def one_save(engine: Engine, step: int, timeout_s: float) -> dict[str, Any]:
    """Save, wait until durable, check, delete."""
    expected = engine.state.digests() if engine.checked else {}
    start = clock()
    wait = engine.save(step)
    save = Save(step, start, clock())
    watch = Watch(engine, save, wait)
    engine.drain()
    watch.join(timeout_s)
    assert save.durable_s is not None
    size_bytes, files = count(engine.path(step)) if engine.path(step).exists() else (0, 0)
    verdict = verify(engine, step, expected)
    engine.discard(step)
    time.sleep(0.05)
    return {
        "call_s": save.blocked_s,
        "durable_s": save.durable_s - save.start_s,
        "bytes_on_disk": size_bytes,
        "files": files,
        "check": verdict,
    }
