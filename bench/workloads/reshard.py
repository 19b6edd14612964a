"""`reshard`: tensors sharded over N ranks are saved, and restored onto M.

Every element holds its own number, so that each rank can tell what must be in its shard.  Times are those of the
slowest rank, from one barrier to the next, page cache cold.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..durability import count, evict, make_durable
from ..engine import Engine, Unavailable
from ..model import GPT, shape_for
from ..options import Job
from ..ranks import join_group, launch
from ..rivals import engine_class
from ..state import TensorState

STEP = 1
PERIOD = 1 << 24
"""Elements are numbered modulo this: every such number is exact in fp32."""


def measure(job: Job) -> dict[str, Any]:
    """Run the job, or in a process that it started one rank of one phase; raw figures in seconds and bytes."""
    if job.phase == "save":
        return save(job)
    if job.phase == "restore":
        return restore(job)
    if not engine_class(job.engine).reshards:
        raise Unavailable("it does not restore DTensors onto another number of ranks")
    saved = launch(job, "save", job.ranks)
    restored = launch(job, "restore", job.target_ranks)
    size_bytes, files = count(Path(job.directory))
    return {
        "state_bytes": sum(one["state_bytes"] for one in saved),
        "ranks": [job.ranks, job.target_ranks],
        "save_s": max(one["seconds"] for one in saved),
        "restores_s": [max(times) for times in zip(*(one["seconds"] for one in restored), strict=True)],
        "read_bytes": sum(one["read_bytes"] for one in restored),
        "bytes_on_disk": size_bytes,
        "files": files,
        "check": next((one["check"] for one in restored if one["check"] != "ok"), "ok"),
    }


def sharded(job: Job, rank: int) -> tuple[TensorState, dict[str, torch.Tensor]]:
    """This rank's DTensors, and beside them the local values that they must hold."""
    mesh = init_device_mesh("cpu", (job.ranks,))
    with torch.device("meta"):
        model = GPT(shape_for(job.size, job.state_bytes))
    tensors: dict[str, torch.Tensor] = {}
    truth = {}
    for name, parameter in model.named_parameters():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            rows = -(-parameter.shape[0] // job.ranks)
            begin, end = (min(parameter.shape[0], rows * n) for n in (rank, rank + 1))
            per_row = parameter.numel() // parameter.shape[0]
            numbers = torch.arange(begin * per_row, end * per_row).remainder_(PERIOD).to(torch.float32)
            local = numbers.view(end - begin, *parameter.shape[1:])
            key = f"{name}:{kind}"
            truth[key] = local
            tensors[key] = DTensor.from_local(
                local.clone(),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=parameter.shape,
                stride=tuple(parameter.stride()),
            )
    return TensorState(tensors), truth


def save(job: Job) -> dict[str, Any]:
    """One rank of the saving side."""
    rank = join_group(job)
    state, truth = sharded(job, rank)
    engine = engine_class(job.engine)(Path(job.directory), state)
    dist.barrier()
    start = time.perf_counter()
    wait = engine.save(STEP)
    engine.drain()  # first: some engines finish their saves here, on this thread
    wait()
    dist.barrier()
    seconds = time.perf_counter() - start
    engine.close()
    if rank == 0:
        make_durable(engine.path(STEP))
        evict(engine.path(STEP))
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds, "state_bytes": sum(local.nbytes for local in truth.values())}


def restore(job: Job) -> dict[str, Any]:
    """One rank of the restoring side."""
    rank = join_group(job)
    state, truth = sharded(job, rank)
    engine: Engine = engine_class(job.engine)(Path(job.directory), state)
    seconds = []
    read_before = read_so_far()
    check = "ok"
    for number in range(job.saves):
        for tensor in state.named.values():
            local_of(tensor).fill_(-1)
        if rank == 0:
            evict(engine.path(STEP))
        dist.barrier()
        start = time.perf_counter()
        engine.restore(STEP)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        if number == 0:
            read_bytes = read_so_far() - read_before
        wrong = [name for name, local in truth.items() if not torch.equal(local_of(state.named[name]), local)]
        if wrong:
            check = f"WRONG BYTES in {len(wrong)} tensors on rank {rank}, first {wrong[0]}"
    engine.close()
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": seconds, "read_bytes": read_bytes, "check": check}


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The live local shard of a DTensor."""
    assert isinstance(tensor, DTensor)
    local: torch.Tensor = tensor.to_local()
    return local


def read_so_far(what: str = "rchar:") -> int:
    """Bytes that this process has asked the kernel to read, or "wchar:" to write (through a memory map: none)."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1])
    return 0
