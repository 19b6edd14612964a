"""One rank of two under torch.distributed (gloo): FSDP2 training, saves, and a rank that is stopped or killed.

python rank_job.py RANK PORT ROOT SCENARIO
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import ckptengine as ce
from ckptengine.errors import CheckpointError

TIMEOUT_S = 3.0


def tell(**facts: object) -> None:
    print(facts, flush=True)


def main(rank: int, port: str, root: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
    state = {"model": model, "optim": optimizer}
    checkpointer = ce.Checkpointer(state, root, rank_timeout_s=TIMEOUT_S, on_failure=ce.Tolerate())
    full: dict[str, torch.Tensor] = {}
    for step in range(1, 6):
        model(torch.randn(8, 32, generator=torch.Generator().manual_seed(step * 2 + rank))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        full = {name: value.full_tensor().clone() for name, value in model.state_dict().items()}
        checkpointer.save(step)  # the next step's update is fenced
    checkpointer.wait()
    if rank == 0:
        with ce.open(root, 5) as checkpoint:
            wrong = [n for n, value in full.items() if not torch.equal(checkpoint.read(f"model.{n}"), value)]
        tell(steps=ce.steps(root), wrong=wrong)
    dist.barrier()
    if rank == 1 and scenario != "none":
        os.kill(os.getpid(), signal.SIGKILL if scenario == "kill" else signal.SIGSTOP)
    started_s = time.monotonic()
    handle = checkpointer.save(6)
    try:
        error: CheckpointError | None = handle.exception(30)
    except TimeoutError:
        error = None
        tell(hung=True)
    tell(rank=rank, error=type(error).__name__, waited_s=round(time.monotonic() - started_s, 1), stage=handle.stage)
    if scenario == "kill" and rank == 0:
        checkpointer._close(5)
        os._exit(0)  # the process group has lost a member: nothing of it can be torn down in order
    if scenario == "stop" and rank == 0:
        sys.stdin.readline()  # until the other one goes on
    time.sleep(2 * TIMEOUT_S if scenario == "stop" else 0)
    checkpointer._close(10)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
