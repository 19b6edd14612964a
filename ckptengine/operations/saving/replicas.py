"""Replicas must be equal: every rank digests what it holds of a replicated tensor, and rank 0 compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ckptengine import native
from ckptengine.errors import ReplicasDiffer
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.irregular import Irregular
from ckptengine.operations.saving.structure import Structure
from ckptengine.plan.write import Owner
from ckptengine.snapshot.plain import live_bytes
from ckptengine.snapshot.register import Registered, region_of

_SHOWN = 8


def held_digests(registered: Registered, structure: Structure, rank: int) -> list[tuple[int, int]]:
    """(tensor, raw contribution) of every replica that this rank holds in host memory and does not write whole.

    Reads live memory: to be called before the fence lets go.  Tensors on a device are left out, a copy of each replica
    to the host would cost what writing it once saves.
    """
    found: list[tuple[int, int]] = []
    for leaf in registered.leaves:
        ordinal = structure.ordinal(leaf.name)
        tensor = structure.tensors[ordinal]
        layout = structure.layouts[tensor.layout]
        group = layout.replica_group(rank)
        if len(group) < 2 or not leaf.tensor.is_cpu:
            continue
        if isinstance(tensor.writer, Owner) and group[tensor.writer.index % len(group)] == rank:
            continue  # what it writes is what it holds
        source = registered.copies.get(leaf.name, leaf.tensor)
        raw = 0
        pieces = layout.pieces(rank, leaf.global_shape) if isinstance(layout, Irregular) else leaf.pieces
        for piece in pieces:
            if piece.size:
                data = live_bytes(_contiguous(region_of(source, piece)))
                raw ^= native.raw_positioned(data, piece.box, leaf.global_shape, itemsize(leaf.dtype))
        found.append((ordinal, raw))
    return found


def _contiguous(region: torch.Tensor) -> torch.Tensor:
    return region if region.is_contiguous() else region.contiguous()


def check_replicas(structure: Structure, notes: Sequence[Mapping[str, Any]]) -> None:
    """Compare what the ranks hold; `ReplicasDiffer` names the tensors and the ranks that stand apart."""
    written: list[dict[int, int]] = [dict(zip(*note["crcs"], strict=True)) for note in notes]
    held = [dict(map(tuple, note["held"])) for note in notes]
    wrong: list[str] = []
    for ordinal in sorted({tensor for one in held for tensor in one}):
        tensor = structure.tensors[ordinal]
        layout = structure.layouts[tensor.layout]
        seen: set[int] = set()
        for rank in layout.holders():
            if rank in seen:
                continue
            group = layout.replica_group(rank)
            seen.update(group)
            odd = _odd_ones(group, ordinal, written, held, isinstance(tensor.writer, Owner))
            if odd:
                wrong.append(f"{tensor.name!r} on ranks {list(odd)[:_SHOWN]} of {list(group)[:_SHOWN]}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ReplicasDiffer(
            f"replicas that must be equal differ: {'; '.join(wrong[:_SHOWN])}{more}. The ranks have drifted apart "
            "(a missing reduction, a different seed), or the values belong to each rank alone: then wrap them in "
            "ckptengine.PerRank. Of buffers that DistributedDataParallel broadcasts its first rank's are kept where "
            "the DDP module itself is in the state, not its .module"
        )


def _odd_ones(
    group: Sequence[int],
    ordinal: int,
    written: Sequence[Mapping[int, int]],
    held: Sequence[Mapping[int, int]],
    owned: bool,
) -> Iterable[int]:
    """The members of a replica group that hold something else than most of it."""
    values: dict[int, int] = {}
    for rank in group:
        raw = held[rank].get(ordinal, written[rank].get(ordinal) if owned else None)
        if raw is not None:
            values[rank] = raw
    if len(set(values.values())) < 2:
        return []
    counts = list(values.values())
    common = max(set(counts), key=lambda value: (counts.count(value), value == counts[0]))
    return [rank for rank, value in values.items() if value != common]
