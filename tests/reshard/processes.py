"""Real ranks over gloo: train under one parallelism, save, go on; restore under another, and go on from there.

Run as a program: ``python -m tests.reshard.processes SCENARIO FOLDER``.  It imports torch once and forks the ranks.
Losses of every phase go to ``FOLDER/losses.json``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptengine as ce

WIDTH, BLOCKS, BATCH = 8, 2, 12
SAVED_AT, LAST = 3, 6
SCENARIOS: dict[str, list[tuple[str, int]]] = {
    "fsdp": [("fsdp", 4), ("fsdp", 2), ("fsdp", 3), ("tp-fsdp", 4)],
    "tp-pp": [("tp-pp", 4), ("single", 1)],
    "single": [("single", 1), ("single", 1), ("tp-pp", 4)],
    "single-more": [("single", 1), ("ddp", 2), ("hsdp", 4)],
    "fsdp-again": [("fsdp", 4), ("fsdp", 4), ("tp-pp", 4)],
    "ddp": [("ddp", 2), ("ddp", 2), ("fsdp", 2), ("single", 1)],
    "hsdp": [("hsdp", 4), ("hsdp", 4), ("ddp", 3), ("fsdp", 4), ("tp-fsdp", 4)],
    "tp-fsdp": [("tp-fsdp", 4), ("tp-pp", 4), ("fsdp", 3), ("hsdp", 4), ("tp-fsdp", 4)],
    "fsdp1": [("fsdp1", 4), ("fsdp1", 4), ("fsdp1-flat", 2), ("fsdp", 3), ("single", 1)],
    "fsdp1-flat": [("fsdp1-flat", 3), ("fsdp1-flat", 3), ("fsdp1-hybrid", 4), ("ddp", 2)],
    "fsdp1-more": [("fsdp1-hybrid", 4), ("fsdp1-hybrid", 4), ("fsdp1-tp", 4), ("fsdp1-none", 2), ("fsdp1-zero2", 3)],
    "fsdp1-tp": [("fsdp1-tp", 4), ("fsdp1-tp", 4), ("tp-fsdp", 4), ("fsdp1-flat-none", 2), ("fsdp1-flat-zero2", 4)],
}
"""Each phase restores what the first one saved, and saves it again before it goes on."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return result


class Net(nn.Module):
    """Some of the blocks of one network, under their own names."""

    def __init__(self, numbers: range) -> None:
        super().__init__()
        torch.manual_seed(5)
        blocks = [Block() for _ in range(BLOCKS)]
        self.blocks = nn.ModuleDict({str(n): blocks[n] for n in numbers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x


def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, WIDTH, generator=generator).chunk(parts)[part]
    return x, torch.sin(x.cumsum(1))


Step = Callable[[int], torch.Tensor]


def whole_step(net: nn.Module, part: int, parts: int) -> Step:
    """Forward and backward of one data-parallel part; the loss of all parts."""

    def step(number: int) -> torch.Tensor:
        x, y = batch(number, part, parts)
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        return loss.detach()

    return step


def tensor_parallel(net: Net, mesh: Any) -> None:
    for block in net.blocks.values():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def pipelined_step(net: nn.Module, stage: int, peer: int) -> Step:
    """Two stages: activations go forward, their gradients come back."""

    def step(number: int) -> torch.Tensor:
        x, y = batch(number, 0, 1)
        loss = torch.zeros(())
        if stage == 0:
            h = net(x)
            dist.send(h.detach().contiguous(), peer)
            gradient = torch.empty_like(x)
            dist.recv(gradient, peer)
            h.backward(gradient)
        else:
            h = torch.empty_like(x)
            dist.recv(h, peer)
            h.requires_grad_(True)
            found = nn.functional.mse_loss(net(h), y)
            found.backward()
            dist.send(h.grad.contiguous(), peer)
            loss = found.detach()
        return loss * 2  # averaged over both stages, of which one has it

    return step


def build(kind: str, rank: int, world: int) -> tuple[nn.Module, Step]:
    """The network of a rank, and one step of it."""
    if kind == "tp-pp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
        stage = rank // 2
        net = Net(range(stage, stage + 1))
        tensor_parallel(net, mesh["tp"])
        return net, pipelined_step(net, stage, (rank + 2) % 4)
    net = Net(range(BLOCKS))
    if kind == "single":
        return net, whole_step(net, 0, 1)
    if kind.startswith("fsdp1"):
        return fsdp1(kind, net, rank, world)
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(net)
        return wrapped, whole_step(wrapped, rank, world)
    if kind == "tp-fsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(net, mesh["tp"])
        shards, part, parts = mesh["dp"], rank // 2, 2
    elif kind == "hsdp":
        shards, part, parts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")), rank, world
    else:
        shards, part, parts = init_device_mesh("cpu", (world,)), rank, world
    for block in net.blocks.values():
        fully_shard(block, mesh=shards)
    fully_shard(net, mesh=shards)
    return net, whole_step(net, part, parts)


def fsdp1(kind: str, net: Net, rank: int, world: int) -> tuple[nn.Module, Step]:
    """FSDP1 after an eval forward, so that a restore finds whole parameters that were gathered before it."""
    options: dict[str, Any] = {"sharding_strategy": ShardingStrategy.FULL_SHARD}
    part, parts = rank, world
    if kind.endswith("hybrid"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
        options = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    elif kind.endswith("tp"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(net, mesh["tp"])
        options["device_mesh"], part, parts = mesh["dp"], rank // 2, 2
    elif kind.endswith("zero2"):
        options["sharding_strategy"] = ShardingStrategy.SHARD_GRAD_OP
    elif kind.endswith("none"):
        options["sharding_strategy"] = ShardingStrategy.NO_SHARD
    wrapped = FullyShardedDataParallel(
        net,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params="flat" not in kind,
        device_id=torch.device("cpu"),
        **options,
    )
    with torch.no_grad():
        wrapped(batch(0, part, parts)[0])
    return wrapped, whole_step(wrapped, part, parts)


def phase(kind: str, world: int, rank: int, folder: Path, number: int) -> list[float]:
    """Restore where there is something, train to `LAST`, save on the way if this is the first phase."""
    net, step = build(kind, rank, world)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    with ce.Checkpointer({"model": net, "optim": optimizer}, folder / "run", random=False) as checkpointer:
        start = checkpointer.restore() or 0
        assert start == (0 if number == 0 else SAVED_AT), (start, number)
        if number:
            ce.save({"model": net, "optim": optimizer}, folder / f"again-{number}", SAVED_AT)
        for at in range(start + 1, LAST + 1):
            optimizer.zero_grad()
            loss = step(at)
            if world > 1:
                dist.all_reduce(loss)
                loss /= world
            losses.append(float(loss))
            optimizer.step()
            if number == 0 and at == SAVED_AT:
                checkpointer.save(at).wait()
        held = [p for p in net.parameters() if isinstance(p, DTensor)]
        assert bool(held) == (kind not in ("single", "ddp") and not kind.startswith("fsdp1"))
    return losses


def rank_main(kind: str, world: int, rank: int, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        store = dist.FileStore(str(folder / f"store-{number}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    losses = phase(kind, world, rank, folder, number)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        (folder / f"losses-{number}.json").write_text(json.dumps(losses))


def fork_ranks(kind: str, world: int, folder: Path, number: int) -> None:
    """Run one phase in ``world`` fresh children; exits when one fails."""
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            status = 1
            try:
                rank_main(kind, world, rank, folder, number)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"phase {number} ({kind} on {world} ranks) failed")


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    assert ce.Checkpointer  # imported here, once, and not in every rank
    torch.optim.AdamW([nn.Parameter(torch.ones(1))]).zero_grad()
    for number, (kind, world) in enumerate(SCENARIOS[scenario]):
        fork_ranks(kind, world, folder, number)


if __name__ == "__main__":
    main()
