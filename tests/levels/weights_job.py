"""A job with a model and an optimizer, to be signalled: ``python weights_job.py ROOT MEMORY DISK CAP SIGTERM_S``;
alone or under torchrun.

Every weight and every moment follows from the step.  Lines on standard output: ``durable N``, ``trained N``.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ckptengine as ce

SIZE = 200


def make() -> dict[str, Any]:
    model = torch.nn.Linear(SIZE, SIZE, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "note": {"step": 0}}


def weights_of(step: int) -> torch.Tensor:
    return torch.arange(SIZE * SIZE, dtype=torch.float32).reshape(SIZE, SIZE) + step


def moments_of(step: int) -> torch.Tensor:
    return -weights_of(step) - 0.5


def set_all(state: dict[str, Any], step: int) -> None:
    with torch.no_grad():
        state["model"].weight.copy_(weights_of(step))
        (kept,) = state["optimizer"].state.values()
        kept["exp_avg"].copy_(moments_of(step))
        kept["exp_avg_sq"].copy_(moments_of(step) ** 2)
    state["note"]["step"] = step


def main() -> None:
    root, memory, disk, cap, sigterm_s = sys.argv[1:]
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    state = make()
    tiers = [ce.Tier(memory), ce.Tier(disk, max_bytes_per_s=float(cap))]
    with ce.Checkpointer(
        state, root, tiers=tiers, interval=ce.Every(steps=10**6), sigterm_s=float(sigterm_s), random=False
    ) as checkpointer:
        handle = None
        for step in itertools.count(1):
            time.sleep(0.02)
            checkpointer.fence()
            set_all(state, step)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            if step == 1:
                handle = checkpointer.save(step)
                handle.add_done_callback(lambda h: os.write(1, f"{h.stage} {h.step}\n".encode()))
            else:
                checkpointer.step(step)
            os.write(1, f"trained {step}\n".encode())


if __name__ == "__main__":
    main()
