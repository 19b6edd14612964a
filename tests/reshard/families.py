"""One small model under every parallelism: what each rank holds of it, every element its own global index.

Logical tensors do not depend on the parallelism; which rank holds what of them does.  Elements are index bit patterns,
so that any element that lands in a wrong place is seen, whatever its dtype.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ckptengine import Sharded
from ckptengine.layout.mesh import Mesh
from ckptengine.layout.placement import Flat, Placement, Replicate, Shard, StridedShard
from ckptengine.layout.sharding import Sharding

LAYERS, HIDDEN, FFN = 2, 12, 20
HEADS, KV_HEADS, HEAD = 4, 2, 3
EXPERTS = 8
SENTINEL = -7
Rows = Callable[[int, int, int], list[tuple[int, int]]]
"""(rows in all, ranks, rank) -> the runs of rows that a rank holds."""
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64}
_LIMIT = {torch.float32: 1 << 30, torch.bfloat16: 30000, torch.int64: 1 << 40}


@dataclass(frozen=True)
class Parallel:
    """``family``: ddp, fsdp, hsdp, zero1 (optimizer per parameter), zero2 (one flat buffer) or zero3, along ``dp``."""

    family: str = "ddp"
    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    fused: bool = False
    """Whether tensor parallelism cuts fused weights, key/value heads and a padded vocabulary as Megatron does."""

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        axes = "".join(f"-{name}{n}" for name in ("dp", "tp", "pp", "ep") if (n := getattr(self, name)) > 1)
        return f"{self.family}{axes}{'-fused' if self.fused else ''}"


@dataclass(frozen=True)
class Kind:
    """One logical tensor.  ``tp``: the dimension that tensor parallelism cuts, None for none."""

    shape: tuple[int, ...]
    tp: int | None = None
    special: str = ""
    stage: float = 0.0
    """Where among the pipeline's stages, from 0 (first) to below 1 (last); some stages of a long one hold nothing."""


@cache
def model(vocabulary: int) -> dict[str, Kind]:
    """Every parameter."""
    found = {"embed.weight": Kind((vocabulary, HIDDEN), 0, "vocab")}
    for n in range(LAYERS):
        place, name = n / LAYERS, f"layers.{n}"
        qkv = (HEADS + 2 * KV_HEADS) * HEAD
        found |= {
            f"{name}.qkv.weight": Kind((qkv, HIDDEN), 0, "qkv", place),
            f"{name}.kv.weight": Kind((KV_HEADS * HEAD, HIDDEN), 0, "kv", place),
            f"{name}.out.weight": Kind((HIDDEN, HEADS * HEAD), 1, "", place),
            f"{name}.up.weight": Kind((FFN, HIDDEN), 0, "", place),
            f"{name}.norm.weight": Kind((HIDDEN,), None, "", place),
            f"{name}.odd.bias": Kind((7,), 0, "", place),
            f"{name}.tiny.scale": Kind((3,), None, "", place),
            f"{name}.experts.weight": Kind((EXPERTS, 3, 5), None, "experts", place),
        }
    found["head.weight"] = Kind((vocabulary, HIDDEN), 0, "vocab", 0.99)
    return found


def whole(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The logical tensor: the bits of every element are its index, from a start that depends on the name."""
    size = math.prod(shape)
    start = zlib.crc32(name.encode()) % 1000
    numbers = torch.arange(start, start + size, dtype=torch.int64).remainder_(_LIMIT[dtype])
    return numbers.to(_BITS[dtype]).view(dtype).view(tuple(shape))


@dataclass
class Rank:
    """One rank's state, and the local tensors in it by canonical name."""

    state: dict[str, Any] = field(default_factory=lambda: {"model": {}, "optim": {}})
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget every stored element; padding stays."""
        for tensor in self.tensors.values():
            bits = tensor.view(_BITS[tensor.dtype])
            bits[bits != SENTINEL] = -3


def build(parallel: Parallel, vocabulary: int = 17, *, states: Sequence[str] = ("exp_avg",)) -> list[Rank]:
    """What every rank holds: bf16 parameters, fp32 masters and optimizer states, counters, hyper-parameters."""
    ranks = [Rank() for _ in range(parallel.world)]
    for name, kind in model(vocabulary).items():
        if name == "head.weight" and parallel.pp == 1:
            continue
        where = _Place(parallel, kind)
        for rank in where.ranks:
            one = ranks[rank]
            holder = _Holder(one, rank, where)
            one.state["model"][name] = holder.tensor(f"model.{name}", kind.shape, torch.bfloat16, False)
            optimizer = {"step": _counter(one, f"optim.{name}.step")}
            for state in ("master", *states):
                optimizer[state] = holder.tensor(f"optim.{name}.{state}", kind.shape, torch.float32, True)
            one.state["optim"][name] = optimizer
    for one in ranks:
        if parallel.pp == 1:  # tied
            one.state["model"]["head.weight"] = one.state["model"]["embed.weight"]
            one.state["optim"]["head.weight"] = one.state["optim"]["embed.weight"]
        one.state["groups"] = [{"lr": 0.1, "betas": (0.9, 0.95)}, {"lr": 1e-3, "weight_decay": 0.0}]
    return ranks


def _counter(one: Rank, name: str) -> torch.Tensor:
    one.tensors[name] = whole("step", (), torch.float32).clone()
    return one.tensors[name]


class _Place:
    """The ranks that hold a parameter: those of its pipeline stage, as a mesh of data by tensor parallel."""

    def __init__(self, parallel: Parallel, kind: Kind) -> None:
        self.parallel, self.kind = parallel, kind
        stage = int(kind.stage * parallel.pp)
        size = parallel.dp * parallel.tp
        self.ranks = range(stage * size, (stage + 1) * size)

    def mesh(self, *shape: int) -> Mesh:
        return Mesh(shape, tuple("abcd"[: len(shape)]), tuple(self.ranks))


class _Holder:
    """Makes one rank's tensors of one parameter."""

    def __init__(self, one: Rank, rank: int, where: _Place) -> None:
        self.one, self.rank, self.where = one, rank, where

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, is_state: bool) -> Any:
        parallel, kind = self.where.parallel, self.where.kind
        full = whole(name if "head" not in name else name.replace("head", "embed"), shape, dtype)
        if (
            parallel.fused
            and parallel.tp > 1
            and kind.special in _FUSED
            and not (is_state and "zero" in parallel.family)
        ):
            return self._fused(name, full, _FUSED[kind.special])
        layout = _layout(self.where, shape, is_state)
        if layout is None:
            self.one.tensors[name] = full.clone()
            return self.one.tensors[name]
        local = torch.full(layout.local_shape(self.rank, shape), SENTINEL, dtype=_BITS[dtype]).view(dtype)
        for piece in layout.pieces(self.rank, shape):
            if piece.size:
                part = full[tuple(slice(a, b) for a, b in zip(piece.box.offsets, piece.box.ends, strict=True))]
                local.view(-1).as_strided(piece.box.shape, piece.strides, piece.start).copy_(part)
        self.one.tensors[name] = local
        return Sharded(local, shape, layout=layout, rank=self.rank, padding=True)

    def _fused(
        self, name: str, full: torch.Tensor, rows_of: Callable[[int, int, int], list[tuple[int, int]]]
    ) -> Sharded:
        """Several runs of rows beside each other, and padding after them where a vocabulary ends."""
        parallel = self.where.parallel
        tp = self.rank % parallel.tp
        rows = rows_of(full.shape[0], parallel.tp, tp)
        total = sum(b - a for a, b in rows)
        if self.where.kind.special == "vocab":
            total = _padded(full.shape[0], parallel.tp) // parallel.tp
        bits = torch.full((total, full.shape[1]), SENTINEL, dtype=_BITS[full.dtype])
        local = bits.view(full.dtype)
        at = 0
        for a, b in rows:
            local[at : at + b - a] = full[a:b]
            at += b - a
        self.one.tensors[name] = local
        parts = [((a, 0), (b - a, full.shape[1])) for a, b in rows]
        return Sharded(local, tuple(full.shape), parts=parts, padding=True)


def _padded(vocabulary: int, tp: int) -> int:
    return -(-vocabulary // (8 * tp)) * 8 * tp


def _vocab(n: int, tp: int, index: int) -> list[tuple[int, int]]:
    each = _padded(n, tp) // tp
    start, stop = min(n, index * each), min(n, (index + 1) * each)
    return [(start, stop)] if start < stop else []


def _kv(n: int, tp: int, index: int) -> list[tuple[int, int]]:
    """Heads over ranks; where there are more ranks than heads, several ranks hold the same one."""
    if tp >= KV_HEADS:
        head = index * KV_HEADS // tp
        return [(head * HEAD, (head + 1) * HEAD)]
    each = KV_HEADS // tp * HEAD
    return [(index * each, (index + 1) * each)]


def _qkv(n: int, tp: int, index: int) -> list[tuple[int, int]]:
    """The rank's rows of Q, of K and of V, of unequal widths."""
    q = HEADS * HEAD
    bounds = [HEADS * i // tp * HEAD for i in (index, index + 1)]
    kv = _kv(KV_HEADS * HEAD, tp, index)
    keys = [(q + a, q + b) for a, b in kv]
    values = [(q + KV_HEADS * HEAD + a, q + KV_HEADS * HEAD + b) for a, b in kv]
    return [(bounds[0], bounds[1]), *keys, *values]


_FUSED = {"vocab": _vocab, "kv": _kv, "qkv": _qkv}


def _layout(where: _Place, shape: tuple[int, ...], is_state: bool) -> Sharding | None:
    """The sharding of a tensor; None for a plain one that every rank of the stage holds."""
    parallel, kind = where.parallel, where.kind
    tp: Placement = Replicate() if kind.tp is None or parallel.tp == 1 else Shard(kind.tp)
    if kind.special == "experts" and parallel.ep > 1:
        mesh = where.mesh(parallel.dp // parallel.ep, parallel.ep, parallel.tp)
        outer: Placement = Shard(1) if parallel.family == "fsdp" else Replicate()
        return Sharding(mesh, (outer, Shard(0), Replicate()))
    if parallel.family == "hsdp":
        groups = 2 if parallel.dp % 2 == 0 else 1
        mesh = where.mesh(groups, parallel.dp // groups, parallel.tp)
        return Sharding(mesh, (Replicate(), _fsdp(tp, parallel.tp), tp))
    dp: Placement = Replicate()
    if parallel.family == "fsdp":
        dp = _fsdp(tp, parallel.tp)
    elif parallel.family == "zero3" or (parallel.family == "zero1" and is_state):
        dp = Flat(padded=True)
    elif parallel.family == "zero2" and is_state:
        size = math.prod(shape) // (parallel.tp if isinstance(tp, Shard) else 1)
        dp = Flat(offset=5, part=max(1, -(-(size + 29) // parallel.dp)))  # between others in one buffer
    if isinstance(dp, Replicate) and isinstance(tp, Replicate):
        return None
    return Sharding(where.mesh(parallel.dp, parallel.tp), (dp, tp))


def _fsdp(tp: Placement, degree: int) -> Placement:
    """FSDP over tensor parallel cuts what tensor parallelism left of the same dimension."""
    return StridedShard(0, degree) if tp == Shard(0) else Shard(0)
