"""One training run of the demo, in a process (or rank) of its own: ``python -m ckptengine.demo.train``.

Writes ``losses-<run>.jsonl`` (step and loss as exact hexadecimal), ``saves-<run>.jsonl`` and, when it gets to the end,
``final-<run>.json`` with the SHA-256 of every tensor of the final weights and optimizer state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ckptengine.checkpointer import Checkpointer
from ckptengine.demo.corpus import ShuffledLoader, read_corpus
from ckptengine.demo.gpt import GPT, GPTConfig
from ckptengine.operations.saving.handle import SaveHandle


def build(steps: int, rank: int, world: int) -> dict[str, Any]:
    """The state of a fresh run: the same on every start."""
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(0)
    config = GPTConfig()
    model = GPT(config)
    if world > 1:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    torch.manual_seed(1000 + rank)  # dropout differs between ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return {
        "model": model,
        "optim": optimizer,
        "sched": CosineAnnealingLR(optimizer, steps),
        "loader": ShuffledLoader(read_corpus(), config.context, 8, rank=rank, world=world),
    }


def train(options: argparse.Namespace, rank: int, world: int) -> None:
    """Train to the last step, saving as told; dies by its own hand in the save of ``--kill-at``."""
    state = build(options.steps, rank, world)
    out = Path(options.dir)
    with (
        (out / f"losses-{options.run}-{rank}.jsonl").open("a") as losses,
        (out / f"saves-{options.run}-{rank}.jsonl").open("a") as saves,
        Checkpointer(state, out / options.root) as checkpointer,
    ):
        start = checkpointer.restore() or 0
        if rank == 0:
            print(f"start {start}", flush=True)
        for step in range(start + 1, options.steps + 1):
            loss = _update(state, world)
            print(json.dumps({"step": step, "loss": float(loss).hex()}), file=losses, flush=True)
            if step % options.every == 0 or step == options.steps:
                handle = checkpointer.save(step, metrics={"loss": float(loss)})
                handle.add_done_callback(lambda ended: _report(ended, saves))
                if step == options.kill_at:
                    _die_inside(handle)
            if rank == 0:
                print(f"step {step} loss {float(loss):.4f}", flush=True)
    _final(state, out / f"final-{options.run}.json", rank)


def _update(state: dict[str, Any], world: int) -> torch.Tensor:
    model, optimizer = state["model"], state["optim"]
    loss: torch.Tensor = model(state["loader"].next())
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    state["sched"].step()
    loss = loss.detach()
    if world > 1:
        dist.all_reduce(loss)
        loss /= world
    return loss


def _report(handle: SaveHandle, file: TextIO) -> None:
    if not file.closed:
        print(json.dumps({"step": handle.step, "stage": handle.stage, **handle.progress}), file=file, flush=True)


def _die_inside(handle: SaveHandle) -> None:
    """SIGKILL to ourselves while bytes of the save are on their way and none of it is committed."""
    while handle.stage in ("capturing", "captured"):
        if handle.progress.get("written_bytes", 0) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0)


def _final(state: dict[str, Any], path: Path, rank: int) -> None:
    digests: dict[str, str] = {}
    tensors = {f"model.{name}": p for name, p in state["model"].named_parameters()}
    names = {id(p): name for name, p in state["model"].named_parameters()}
    for parameter, entry in state["optim"].state.items():
        tensors.update({f"optim.{names[id(parameter)]}.{key}": value for key, value in entry.items()})
    for name, tensor in sorted(tensors.items()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digests[name] = hashlib.sha256(whole.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if rank == 0:
        path.write_text(json.dumps(digests))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--dir", required=True)
    arguments.add_argument("--root", required=True)
    arguments.add_argument("--run", required=True)
    arguments.add_argument("--steps", type=int, required=True)
    arguments.add_argument("--every", type=int, required=True)
    arguments.add_argument("--kill-at", type=int, default=-1)
    options = arguments.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo")
    try:
        train(options, rank, world)
    finally:
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
