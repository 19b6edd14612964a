"""`memory`: host memory at its peak, above what training alone takes, over all processes the engine starts.

A training loop saves every second step; another process samples the proportional set size of the whole tree.  What
is allocated when the engine is set up counts; what importing it takes counts too.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

from ..loop import Trainer, clock
from ..memory import Sampler
from ..options import Job
from ..rivals import engine_class
from ..state import gpt_state
from .stall import WARM_UP_STEPS

SETTLE_S = 0.3


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in bytes."""
    state = gpt_state(job.size, job.state_bytes, job.device, job.seed)
    steps = 2 * job.saves + 1
    trainer = Trainer(state, max(steps, WARM_UP_STEPS + 2))
    with Sampler() as sampler:
        trainer.run(WARM_UP_STEPS, None, 1, 0, job.timeout_s)
        gc.collect()
        plain_start = clock()
        trainer.run(WARM_UP_STEPS + 2, None, 1, 0, job.timeout_s)
        time.sleep(SETTLE_S)
        engine_start = clock()
        engine = engine_class(job.engine)(Path(job.directory), state)
        try:
            trace = trainer.run(steps, engine, 2, 1, job.timeout_s)
            time.sleep(SETTLE_S)
        finally:
            engine.close()
    baseline = max(memory for moment, memory, _ in sampler.samples if plain_start <= moment < engine_start)
    for save in trace.saves:
        engine.discard(save.step)
    return {
        "state_bytes": state.size_bytes,
        "baseline_bytes": baseline,
        "peak_bytes": sampler.peak_bytes(engine_start),
        "extra_bytes": max(0, sampler.peak_bytes(engine_start) - baseline),
        "saves": len(trace.saves),
        "samples": [[moment - engine_start, memory, files] for moment, memory, files in sampler.samples],
    }
