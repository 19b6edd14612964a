"""Pipeline stages without ZeRO: which layers' parameters the positions of each stage's optimizer mean."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ckptengine.sources.deepspeed.header import ModelStates
from ckptengine.sources.deepspeed.plainopt import Pool, positions_in
from ckptengine.sources.deepspeed.weights import Weights
from ckptengine.sources.held import Whole
from ckptengine.sources.stored import StoredTensor


def stage_layers(stages: Sequence[ModelStates], weights: Weights) -> list[tuple[Pool, int]]:
    """For every stage its parameters in the order of the layers, and how many the stages before it have.

    Where the number of parameters does not say where a stage begins (some are frozen, say), it may have any of them.
    """
    buffers = {name for stage in stages for name in stage.buffers}
    layers: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name, held in weights.held.items():
        if isinstance(held, Whole) and name not in buffers:
            layers.setdefault(name.partition(".")[0], []).append((name, held.tensor))
    counts = [positions_in(stage.optimizer or {}) for stage in stages]
    first = [sum(counts[:at]) for at in range(len(counts))]
    pools = _cut(layers, counts)
    return list(zip(pools, first, strict=True))


def _cut(layers: Mapping[str, Sequence[tuple[str, StoredTensor]]], counts: Sequence[int]) -> list[Pool]:
    every = [entry for entries in layers.values() for entry in entries]
    ends = {0}
    for entries in layers.values():
        ends.add(max(ends) + len(entries))
    bounds = [sum(counts[:at]) for at in range(len(counts) + 1)]
    if bounds[-1] != len(every) or not set(bounds) <= ends:
        return [every for _ in counts]
    return [every[start:stop] for start, stop in itertools.pairwise(bounds)]
