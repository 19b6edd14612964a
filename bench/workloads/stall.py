"""`stall`: a real training loop with a checkpoint every k steps, beside itself without.

One process: a block of plain steps notes the digests of the state at every step at which a save will happen; the
state is put back; the same steps run with saves.  The same steps give the same bits, so that every checkpoint can be
compared with what it must hold although nothing disturbs the measured block.  Plain blocks before and after each
measured one give the baseline of this very process.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..check import verify
from ..durability import count
from ..engine import Engine
from ..loop import Step, Trainer
from ..options import Job
from ..rivals import engine_class
from ..state import TrainingState, differences, gpt_state

WARM_UP_STEPS = 2


def block_steps(job: Job, every: int) -> int:
    """Steps of a block: as asked, and enough for two saves and a step that follows them."""
    return max(job.steps, every + 2)


def plain_steps(job: Job) -> int:
    """Steps of a plain block; there is one before every block with saves, and one at the end."""
    return min(job.steps // 2 + 1, 4)


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in seconds and bytes."""
    state = gpt_state(job.size, job.state_bytes, job.device, job.seed)
    longest = max(block_steps(job, every) for every in job.every)
    trainer = Trainer(state, longest)
    trainer.run(WARM_UP_STEPS, None, 1, 0, job.timeout_s)
    root = Path(job.directory)
    engine = engine_class(job.engine)(root, state)
    try:
        saved = {step for every in job.every for step in range(0, block_steps(job, every), every)}
        expected = reference(trainer, longest, saved | {block_steps(job, every) - 1 for every in job.every})
        first = first_save(trainer, engine, job)
        blocks = []
        plain: list[Step] = []
        number = 1_000
        for every in job.every:
            state.reset()
            plain += trainer.run(plain_steps(job), None, 1, 0, job.timeout_s).steps
            block = measured_block(trainer, engine, job, every, number, expected)
            number += 1_000
            blocks.append(block)
        state.reset()
        plain += trainer.run(plain_steps(job), None, 1, 0, job.timeout_s).steps
    finally:
        engine.close()
    plain_s = [step.end_s - step.start_s for step in plain]
    return {
        "state_bytes": state.size_bytes,
        "tensors": len(state.tensors()),
        "plain_steps_s": plain_s,
        "plain_step_s": statistics.median(plain_s),
        "first_save": first,
        "blocks": blocks,
    }


def reference(trainer: Trainer, steps: int, wanted: set[int]) -> dict[int, dict[str, str]]:
    """Digests after the `wanted` ones of the first `steps` steps, with nothing in flight."""
    trainer.state.reset()
    expected = {}
    for number in range(steps):
        trainer.step(number, None)
        if number in wanted:
            expected[number] = trainer.state.digests()
    return expected


def first_save(trainer: Trainer, engine: Engine, job: Job) -> dict[str, Any]:
    """The first save of the process, with whatever the engine allocates for it; it also warms the engine up."""
    trainer.state.reset()
    trace = trainer.run(2, engine, 1, 1, job.timeout_s)
    size_bytes, files = (0, 0) if job.engine == "none" else count(engine.path(1))
    for save in trace.saves:
        engine.discard(save.step)
    save = trace.saves[0]
    return {
        "blocked_s": save.blocked_s,
        "durable_s": (save.durable_s or trace.drained_s) - save.start_s,
        "bytes_on_disk": size_bytes,
        "files": files,
    }


def measured_block(
    trainer: Trainer, engine: Engine, job: Job, every: int, first_number: int, expected: dict[int, dict[str, str]]
) -> dict[str, Any]:
    """One block with saves, then the check of each of its checkpoints."""
    state: TrainingState = trainer.state
    state.reset()
    steps = block_steps(job, every)
    trace = trainer.run(steps, engine, every, first_number, job.timeout_s)
    repeatable = not differences(expected[steps - 1], state.digests())
    checks = []
    for save in reversed(trace.saves):
        verdict = verify(engine, save.step, expected[save.step - first_number])
        if not repeatable and verdict.startswith("WRONG"):
            verdict = "not comparable: the same steps gave other bits without any checkpoint"
        checks.append(verdict)
        engine.discard(save.step)
    return {"every": every, "trace": trace.to_json(), "checks": checks[::-1], "repeatable": repeatable}
