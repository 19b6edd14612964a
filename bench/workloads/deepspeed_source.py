"""A real DeepSpeed checkpoint to convert: ZeRO-2 over two ranks on CPU, written by DeepSpeed after one step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..engine import require
from ..loop import Trainer
from ..options import Job
from ..ranks import join_group
from ..state import gpt_state

RANKS = 2
TAG = "global_step1"
TRUTH = "deepspeed-truth.pt"


def write(job: Job) -> dict[str, Any]:
    """One rank of the group that trains for a step and saves."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_group(job)
    deepspeed = require("deepspeed")
    deepspeed.init_distributed(dist_backend="gloo")
    state = gpt_state(job.size, job.state_bytes, "cpu", job.seed)
    engine, *_ = deepspeed.initialize(
        model=state.model,
        optimizer=torch.optim.AdamW(state.model.parameters(), lr=3e-4),
        config={
            "train_micro_batch_size_per_gpu": state.shape.batch,
            "zero_optimization": {"stage": 2},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        },
    )
    loss = engine(*Trainer(state, 1).batch(0))
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(Path(job.directory) / "deepspeed"), tag=TAG)
    found = _truth(state.model)
    if dist.get_rank() == 0:
        torch.save(found, Path(job.directory) / TRUTH)
    dist.barrier()
    return {"state_bytes": state.size_bytes}


def _truth(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and moments as DeepSpeed itself gathers them from the live engine; a collective call."""
    utils = require("deepspeed.utils", "deepspeed")
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"{name}:weight"] = utils.safe_get_full_fp32_param(parameter).detach().clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{name}:{kind}"] = utils.safe_get_full_optimizer_state(parameter, kind).detach().clone()
    return found


def truth(root: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint under ``root`` holds, told by DeepSpeed when it wrote it."""
    loaded: dict[str, torch.Tensor] = torch.load(root / TRUTH, weights_only=True)
    return loaded
