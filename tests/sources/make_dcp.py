"""Write torch DCP checkpoints of many layouts with torch itself, and the truth beside them.

    python tests/sources/make_dcp.py OUT [CASE ...]

Each case starts its own gloo processes, trains a tiny model of odd sizes for two steps and writes
``OUT/<case>/checkpoint`` and ``OUT/<case>/truth.pt`` (canonical name -> full tensor).
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 6, hidden: int = 10, vocab: int = 13) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def cut(model: Net, mesh: Any) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp2(model: Net, world: int) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def hsdp(model: Net, world: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))


def tp(model: Net, world: int) -> nn.Module:
    cut(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    return model


def tp_fsdp(model: Net, world: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    cut(model, mesh["tp"])
    return fully_shard(model, mesh=mesh["dp"])


def fsdp1(model: Net, world: int) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
    )


def ddp(model: Net, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}], lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def write_default(state: dict[str, Any], path: str) -> None:
    dcp.save(state, checkpoint_id=path)


def write_safetensors(state: dict[str, Any], path: str) -> None:
    kind = dcp.filesystem.SerializationFormat.SAFETENSORS
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, serialization_format=kind))


def write_threads(state: dict[str, Any], path: str) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path, thread_count=2, single_file_per_rank=False))


def write_per_rank(state: dict[str, Any], path: str) -> None:
    dcp.save(state, checkpoint_id=path, use_collectives=False)


def write_hf(state: dict[str, Any], path: str) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    dcp.save(state["model"], storage_writer=HuggingFaceStorageWriter(path, save_distributed=True))


CASES: dict[str, tuple[int, Callable[..., nn.Module], Callable[..., Any], Callable[..., None], dict[str, Any]]] = {
    "fsdp2_3": (3, fsdp2, adamw, write_default, {}),
    "fsdp2_8": (8, fsdp2, adamw, write_default, {}),  # some ranks hold nothing of some tensors
    "fsdp2_flat": (2, fsdp2, adamw, write_default, {"flatten_optimizer_state_dict": True}),
    "fsdp2_safetensors": (3, fsdp2, adamw, write_safetensors, {}),
    "fsdp2_threads": (2, fsdp2, sgd, write_threads, {}),
    "fsdp2_per_rank": (2, fsdp2, adamw, write_per_rank, {}),
    "hsdp": (4, hsdp, adamw, write_default, {}),
    "tp": (2, tp, adamw, write_default, {}),
    "tp_fsdp": (4, tp_fsdp, adamw, write_default, {}),
    "fsdp1": (2, fsdp1, adamw, write_default, {}),
    "ddp": (2, ddp, adamw, write_default, {}),
    "hf_sharded": (3, fsdp2, adamw, write_hf, {}),
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def truth_of(model: nn.Module, optimizer: Any, key: str) -> dict[str, torch.Tensor]:
    """Gathered by torch itself, on all ranks."""
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    found = {f"model.{name}": full(tensor) for name, tensor in weights.items()}
    for name, state in states["state"].items():
        found |= {f"{key}.{name}.{kind}": full(value) for kind, value in state.items() if torch.is_tensor(value)}
    return found


def train_and_write(case: str, out: Path) -> None:
    """One case, on every rank of the process group."""
    world, wrap, make_optimizer, write, options = CASES[case]
    torch.manual_seed(0)
    model = wrap(Net(), world)
    optimizer = make_optimizer(model)
    for step in range(2):
        torch.manual_seed(step)
        model(torch.randint(0, 13, (4, 3))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    state = {"model": weights, "optim": states, "extra": {"epoch": 3, "names": ["a", {"b": 2.5}], "none": None}}
    write(state, str(out / case / "checkpoint"))
    truth = truth_of(model, optimizer, "optim")
    if write is write_hf:
        truth = {name: tensor for name, tensor in truth.items() if name.startswith("model.")}
    if dist.get_rank() == 0:
        torch.save({name: tensor.clone() for name, tensor in truth.items()}, out / case / "truth.pt")
    dist.barrier()


def run(rank: int, world: int, cases: list[str], out: str, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
        for case in cases:
            train_and_write(case, Path(out))
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def make(cases: list[str], out: Path) -> None:
    """Write cases of one world size; raises when any process fails."""
    world = CASES[cases[0]][0]
    with tempfile.TemporaryDirectory() as folder:
        args = (world, cases, str(out), f"{folder}/rendezvous")
        mp.start_processes(run, args, nprocs=world, start_method="spawn")


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(CASES)
    for size in sorted({CASES[case][0] for case in chosen}):
        make([case for case in chosen if CASES[case][0] == size], Path(sys.argv[1]))
