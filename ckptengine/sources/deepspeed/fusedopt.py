"""Optimizers without ZeRO whose fp32 copies lie flat, one buffer for each group: 16-bit training with a fused Adam.

The files do not say which parameters a buffer consists of.  The copies do: each rounds to its 16-bit weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.deepspeed.groups import Group, entries, even_group
from ckptengine.sources.deepspeed.header import int_list
from ckptengine.sources.deepspeed.plainopt import (
    COMPARED,
    HALVES,
    Entries,
    Pool,
    Pools,
    groups_and_states,
    plain_optimizer,
)
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.port import Files
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchrecords import cast

FLAT = "fp32_groups_flat"


def any_optimizer(
    outer: Mapping[Any, Any], pools: Pools, inline: InlineFiles, first: int = 0
) -> tuple[Entries, list[dict[Any, Any]]]:
    """(parameter, state, what is held) and the parameter groups with names, from flat buffers or from single tensors.

    Flat buffers of which it is not clear what they consist of are shown whole, by position.
    """
    groups, states = groups_and_states(outer)
    flats = outer.get(FLAT)
    if not isinstance(flats, list) or len(flats) != len(groups) or not groups:
        return plain_optimizer(outer, pools, inline, first)
    left = [*pools.dense, *pools.experts]
    made: list[Group] = []
    named: list[dict[Any, Any]] = []
    for number, (flat, options) in enumerate(zip(flats, groups, strict=True)):
        found = _parameters(flat, left, inline) if isinstance(flat, StoredTensor) else None
        if found is None:
            return plain_optimizer({**outer, "fp32_groups": [[flat] for flat in flats]}, Pools(()), inline, first)
        taken = {name for name, _ in found}
        left = [entry for entry in left if entry[0] not in taken]
        shapes = {name: tensor.shape for name, tensor in found}
        position = (int_list(options.get("params")) or [number])[0]
        state = states.get(position)
        held = [state if isinstance(state, dict) else {}]
        made.append(even_group(f"{FLAT}, group {number}", shapes, None, [flat], held, flat.size, options))
        named.append({**options, "params": list(shapes)})
    return list(entries(made, inline)), named


def _parameters(flat: StoredTensor, pool: Pool, files: Files) -> list[tuple[str, StoredTensor]] | None:
    """The weights that the elements of a buffer round to, one after another; None where that is not clear.

    They follow one another as in the module, in one way only; or, in any order, each is the only one that fits.
    """
    first = _walk(flat, pool, files)
    last = _walk(flat, pool[::-1], files, backwards=True)
    if first is not None and last is not None and first == last[::-1]:
        return first
    return _in_any_order(flat, pool, files)


def _walk(
    flat: StoredTensor, pool: Pool, files: Files, *, backwards: bool = False
) -> list[tuple[str, StoredTensor]] | None:
    found: list[tuple[str, StoredTensor]] = []
    position = flat.size if backwards else 0
    for name, weight in pool:
        start = position - weight.size if backwards else position
        if weight.size and _rounds(flat, start, weight, files):
            found.append((name, weight))
            position = start if backwards else start + weight.size
    return found if position == (0 if backwards else flat.size) else None


def _in_any_order(flat: StoredTensor, pool: Pool, files: Files) -> list[tuple[str, StoredTensor]] | None:
    found: list[tuple[str, StoredTensor]] = []
    left: Sequence[tuple[str, StoredTensor]] = [entry for entry in pool if entry[1].size]
    position = 0
    while position < flat.size:
        fitting = [entry for entry in left if _rounds(flat, position, entry[1], files)]
        if len(fitting) != 1:
            return None
        found += fitting
        left = [entry for entry in left if entry is not fitting[0]]
        position += fitting[0][1].size
    return found


def _rounds(flat: StoredTensor, start: int, weight: StoredTensor, files: Files) -> bool:
    """Whether the elements from ``start`` on round to a weight; of a large one the first and last are compared."""
    if start < 0 or start + weight.size > flat.size or weight.dtype not in HALVES or not weight.is_contiguous:
        return False
    count = min(weight.size, COMPARED)
    return all(
        bytes(cast(_elements(flat, start + at, count, files), flat.dtype, weight.dtype))
        == _elements(weight, at, count, files)
        for at in {0, weight.size - count}
    )


def _elements(tensor: StoredTensor, start: int, count: int, files: Files) -> bytes:
    file, offset = tensor.at(start)
    return files.read(file, offset, count * itemsize(tensor.dtype))
