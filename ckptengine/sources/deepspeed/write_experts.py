"""Experts on expert-parallel ranks, as ZeRO-1 and -2 keep them.

Rank ``r`` of a job with expert parallelism ``ep`` holds the experts of expert rank ``r % ep`` under local numbers; a
group of experts is cut over the ``dp / ep`` ranks that hold the same ones.  Weights lie in one file per expert.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptengine.errors import UnusableRequest
from ckptengine.sources.deepspeed.training import Group, Trained, Training

_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Share:
    """One group as one rank sees it: the rank has part ``position`` of ``count`` parts of it."""

    group: Group
    position: int
    count: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a training and the layout that they are written in; ``layers`` has their number by layer."""

    ep: int
    dp: int
    layers: Mapping[str, int]

    def shares(self, groups: Sequence[Group], rank: int) -> list[Share]:
        """The groups as rank ``rank`` sees them, experts under local numbers."""
        return [
            Share(self._local(group, rank % self.ep), rank // self.ep, self.dp // self.ep)
            if group.options.get("moe") is True
            else Share(group, rank, self.dp)
            for group in groups
        ]

    def _local(self, group: Group, expert_rank: int) -> Group:
        """The experts of one expert rank in the order of its module: by layer, then by local number."""
        order = {layer: at for at, layer in enumerate(self.layers)}
        held: list[tuple[int, int, Trained]] = []
        for member in group.members:
            match = _EXPERT.fullmatch(member.name)
            assert match is not None
            here = self.layers[match[1]] // self.ep
            number = int(match[2]) - expert_rank * here
            if 0 <= number < here:
                local = dataclasses.replace(member, name=f"{match[1]}{number}{match[3]}")
                held.append((order[match[1]], number, local))
        held.sort(key=lambda item: item[:2])
        options = {**group.options, "name": f"ep_size_{self.ep}"}
        return Group(options, tuple(member for _, _, member in held))

    def files(self, training: Training) -> dict[str, dict[str, str]]:
        """Name of each expert's file -> the weights in it and their tensors."""
        order = {layer: at for at, layer in enumerate(self.layers)}
        found: dict[str, dict[str, str]] = {}
        for name, tensor in training.weights.items():
            if match := _EXPERT.fullmatch(name):
                path = f"layer_{order[match[1]]}_expert_{match[2]}_mp_rank_00_model_states.pt"
                found.setdefault(path, {})[name] = tensor
        return found


def experts_of(training: Training, ep: int, dp: int, stage: int) -> Experts | None:
    """None where there are none; `UnusableRequest` for what DeepSpeed could not load."""
    layers: dict[str, int] = {}
    for name in training.weights:
        if match := _EXPERT.fullmatch(name):
            layers[match[1]] = max(layers.get(match[1], 0), int(match[2]) + 1)
    marked = [member for group in training.groups if group.options.get("moe") is True for member in group.members]
    if not layers and not marked:
        if ep != 1:
            raise UnusableRequest(f"ep={ep} cuts experts and there are none (deepspeed_experts) among the weights")
        return None
    if stage not in (1, 2):
        raise UnusableRequest(f"a model with experts is written for ZeRO-1 and ZeRO-2, not for stage {stage}")
    strange = [member.name for member in marked if not _EXPERT.fullmatch(member.name)]
    marked_names = {member.name for member in marked}
    strange += [m.name for m in training.trained if _EXPERT.fullmatch(m.name) and m.name not in marked_names]
    if strange:
        raise UnusableRequest(f"{strange[0]}: experts, and nothing else, belong in groups that are marked as moe")
    uneven = [layer for layer, count in layers.items() if count % ep]
    if uneven or dp % ep:
        what = f"{layers[uneven[0]]} experts of {uneven[0]}" if uneven else f"dp={dp}"
        raise UnusableRequest(f"{what} cannot be divided over ep={ep} expert-parallel ranks")
    return Experts(ep, dp, {layer: layers[layer] for layer in sorted(layers, key=_natural)})


def without_experts(training: Training) -> Training:
    """What the model file holds: everything but the experts."""
    dense = tuple(group for group in training.groups if group.options.get("moe") is not True)
    return dataclasses.replace(
        training,
        weights={name: tensor for name, tensor in training.weights.items() if not _EXPERT.fullmatch(name)},
        groups=dense,
        frozen=tuple(name for name in training.frozen if not _EXPERT.fullmatch(name)),
        buffers=tuple(name for name in training.buffers if not _EXPERT.fullmatch(name)),
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """Layers in the order of their numbers, as modules have them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(text)]
