"""Optimizer states of one rank of a legacy Megatron checkpoint, by parameter name.

Megatron's optimizers know parameters by position only.  Positions follow from the order of the module's parameters,
from what a group holds (``wd_mult``, ``is_expert_parallel``) and from how the distributed optimizer lays out its
buffers; shapes and sizes must agree with that, else the checkpoint is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnreadableFormat
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Chunk, Held, Number, Whole, flat
from ckptengine.sources.megatron.chain import trains_experts
from ckptengine.sources.megatron.masters import ROUNDED, SAMPLE, rounds_to
from ckptengine.sources.megatron.module_order import is_buffer
from ckptengine.sources.megatron.rankfile import RankFile
from ckptengine.sources.megatron.steps import common_step
from ckptengine.sources.megatron.unpadded import Viewed, aligned, without_padding
from ckptengine.sources.stored import StoredTensor

_SHARED = ("word_embeddings.weight", "output_layer.weight")
MASTER = "master"
TRAINED = ("float32", "bfloat16", "float16", "float64")
Entry = tuple[str, str, Held]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer of this rank: its global and local name, its virtual stage and its tensor."""

    name: str
    local: str
    chunk: int
    tensor: StoredTensor

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.local

    @property
    def is_decayed(self) -> bool:
        return not (self.local.endswith(".bias") or len(self.tensor.shape) == 1)

    def whole(self) -> Held:
        return Whole(self.tensor)


def optimizer_states(
    rank: RankFile, parameters: Sequence[Parameter], inline: InlineFiles
) -> tuple[list[Entry], list[dict[Any, Any]]]:
    """(parameter, state, what is held), and the optimizer's groups with names for positions."""
    if rank.optimizer is None:
        return [], []
    chained = rank.optimizer if isinstance(rank.optimizer, list) else [rank.optimizer]
    buffers = rank.buffers if isinstance(rank.buffers, list) else [rank.buffers]
    found: list[Entry] = []
    groups: list[dict[Any, Any]] = []
    for number, state in enumerate(chained):
        if not isinstance(state, dict):
            continue
        mine = _trained_by(number, chained, parameters)
        made = _Optimizer(rank, state, mine, inline)
        held = buffers[number] if number < len(buffers) else None
        if isinstance(held, dict):
            found += made.from_buffers(held)
        elif not made.is_distributed:  # else another expert-parallel rank has this one's buffers
            found += made.from_states()
        groups += made.named_groups()
    return found, groups


def _trained_by(number: int, chained: Sequence[object], parameters: Sequence[Parameter]) -> Sequence[Parameter]:
    """The parameters of one of a chain of optimizers: experts, or all else, of the first virtual stage or the rest."""
    if len(chained) == 1:
        return parameters
    known = trains_experts(dict(enumerate(chained)))
    experts = [known.get(link, link > 0) for link in range(len(chained))]
    mine = [p for p in parameters if p.is_expert == experts[number] or not any(experts)]
    if experts[number] or experts.count(False) == 1:
        return mine
    return [p for p in mine if (p.chunk > 0) == (number > 0)]


class _Optimizer:
    """One of a chain of optimizers."""

    def __init__(
        self, rank: RankFile, state: Mapping[Any, Any], parameters: Sequence[Parameter], inline: InlineFiles
    ) -> None:
        self._rank = rank
        self._outer = state
        inner = state.get("optimizer", state)
        self._inner: Mapping[Any, Any] = inner if isinstance(inner, dict) else {}
        self._inline = inline
        groups = self._inner.get("param_groups")
        self._groups = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        self._trained = _trained(parameters)
        self._sets = _buffer_sets(self._trained)
        if self.is_distributed:
            self._trained = [parameter for members in self._sets for parameter in members]
        self._members = [self._members_of(number, group) for number, group in enumerate(self._groups)]

    @property
    def is_distributed(self) -> bool:
        """Whether the states lie in buffers: Megatron takes the positions out of the groups then."""
        return not any("params" in group for group in self._groups)

    def named_groups(self) -> list[dict[Any, Any]]:
        """The groups with names; without any where the rule does not put every parameter into just one group."""
        names = [[parameter.name for parameter in members] for members in self._members]
        listed = Counter(name for group in names for name in group)
        if listed != Counter({parameter.name: 1 for parameter in self._trained}):
            return [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        return [{**group, "params": held} for group, held in zip(self._groups, names, strict=True)]

    def from_states(self) -> Iterator[Entry]:
        """States by position, and fp32 copies by group and position."""
        states = self._inner.get("state")
        by_position: Mapping[Any, Any] = states if isinstance(states, dict) else {}
        step = common_step(by_position.get("common_step"), self._inline)
        for number, (group, members) in enumerate(zip(self._groups, self._members, strict=True)):
            positions = group.get("params", range(len(members)))
            copies = iter(self._copies_of(number))
            for position, parameter in zip(positions, members, strict=True):
                copy = next(copies, None) if parameter.tensor.dtype != "float32" else None  # fp32 ones have none
                if isinstance(copy, StoredTensor):
                    yield self._entry(parameter, MASTER, copy)
                state = by_position.get(position)
                for key, value in state.items() if isinstance(state, dict) else ():
                    if isinstance(value, StoredTensor):
                        yield self._entry(parameter, str(key), value)
                if step is not None:
                    yield parameter.name, "step", Number(*step)

    def _copies_of(self, number: int) -> Sequence[object]:
        """The fp32 copies of a group's 16-bit parameters."""
        copies = self._outer.get("fp32_from_fp16_params")
        held = copies[number] if isinstance(copies, list) and number < len(copies) else ()
        return held if isinstance(held, list) else ()

    def from_buffers(self, buffers: Mapping[Any, Any]) -> Iterator[Entry]:
        """States of the distributed optimizer: one flat buffer per state, virtual stage and element type."""
        step = common_step(self._groups, self._inline)
        sets = [members[::-1] for members in self._sets]
        held = [value for key, value in sorted(((k, v) for k, v in buffers.items() if type(k) is int))]
        if len(held) != len(sets):
            raise UnreadableFormat(f"{self._rank.path}: the optimizer has {len(held)} buffers, the module {len(sets)}")
        for by_dtype, members in zip(held, sets, strict=True):
            states = next(iter(by_dtype.values()), None) if isinstance(by_dtype, dict) else None
            if not isinstance(states, dict):
                raise UnreadableFormat(f"{self._rank.path}: a buffer of the distributed optimizer is not known")
            tensors = {str(k): v for k, v in states.items() if isinstance(v, StoredTensor) and len(v.shape) == 1}
            starts = self._starts(members, tensors)
            for key, tensor in tensors.items():
                for parameter, start in zip(members, starts, strict=True):
                    chunk = Chunk(tensor, start, 0, parameter.tensor.size)
                    state = MASTER if key == "param" else key
                    yield parameter.name, state, flat(parameter.name, parameter.tensor.shape, [chunk])
            if step is not None:
                yield from ((parameter.name, "step", Number(*step)) for parameter in members)

    def _entry(self, parameter: Parameter, key: str, value: StoredTensor) -> Entry:
        if value.size == 1 and key == "step":
            value = StoredTensor(value.storage, value.dtype, value.start, (), ())
        elif value.shape != parameter.tensor.shape:
            raise UnreadableFormat(
                f"{self._rank.path}: the state {key} at the place of {parameter.local} has shape {list(value.shape)} "
                f"instead of {list(parameter.tensor.shape)}; the optimizer's order of parameters is not known"
            )
        return parameter.name, key, Whole(value)

    def _members_of(self, number: int, group: Mapping[str, Any]) -> list[Parameter]:
        """The parameters of a group.  Where the rule fails (frozen parameters, groups of the user's own), those whose
        weights are the group's fp32 copies, rounded, if there is just one such choice in the module's order.
        """
        members = self._of_group(group)
        positions, copies = group.get("params"), self._copies_of(number)
        if not isinstance(positions, list):
            return members
        if len(positions) == len(members) and self._are_copies(copies, members):
            return members
        first = self._earliest(copies, self._trained)
        last = self._earliest(copies[::-1], self._trained[::-1])
        if len(positions) != len(copies) or first is None or last is None or first != last[::-1]:
            raise UnreadableFormat(
                f"{self._rank.path}: group {number} of the optimizer has {len(positions)} parameters, but "
                f"{len(members)} of the module's parameters belong to it, or others; the states cannot be named"
            )
        return first

    def _are_copies(self, copies: Sequence[object], members: Sequence[Parameter]) -> bool:
        """Whether a sample of the members have the fp32 copies at their places; True where there are no copies."""
        halves = [member for member in members if member.tensor.dtype != "float32"]
        if not copies:
            return True
        if len(copies) != len(halves):
            return False
        sample = list(zip(copies, halves, strict=True))[:: max(1, len(halves) // SAMPLE)]
        return all(isinstance(copy, StoredTensor) and self._is_copy(copy, member) for copy, member in sample)

    def _earliest(self, copies: Sequence[object], parameters: Sequence[Parameter]) -> list[Parameter] | None:
        rest, found = iter(parameters), []
        for copy in copies:
            parameter = next((p for p in rest if isinstance(copy, StoredTensor) and self._is_copy(copy, p)), None)
            if parameter is None:
                return None
            found.append(parameter)
        return found

    def _is_copy(self, copy: StoredTensor, parameter: Parameter) -> bool:
        return copy.shape == parameter.tensor.shape and self._agrees([parameter], [0], copy)

    def _of_group(self, group: Mapping[Any, Any]) -> list[Parameter]:
        """The parameters of a group, by the rule that Megatron groups them by."""
        decayed = group.get("wd_mult", group.get("pre_wd_mult"))
        members = self._trained
        if decayed is not None and len(self._groups) > 1:
            members = [p for p in members if p.is_decayed == (decayed != 0)]
        if not any(other.get("is_expert_parallel") for other in self._groups):
            return members  # experts are in groups of their own where they are parallel only
        return [p for p in members if p.is_expert == bool(group.get("is_expert_parallel"))]

    def _starts(self, members: Sequence[Parameter], tensors: Mapping[str, StoredTensor]) -> list[int]:
        """Where each parameter starts in a buffer without the padding at the end of its buckets.

        The fp32 copies there, rounded, must be the weights, as far as a sample tells.
        """
        sizes = {tensor.size for tensor in tensors.values()}
        if len(sizes) != 1:
            raise UnreadableFormat(f"{self._rank.path}: the distributed optimizer's buffers have different lengths")
        (total,) = sizes
        for starts in _candidates(members, total):
            if self._agrees(members, starts, tensors.get("param")):
                return starts
        raise UnreadableFormat(
            f"{self._rank.path}: the distributed optimizer's buffers hold {total} elements, which does not fit the "
            "module's parameters laid out in one or more buckets; save with --ckpt-format torch_dist instead"
        )

    def _agrees(self, members: Sequence[Parameter], starts: Sequence[int], masters: StoredTensor | None) -> bool:
        """Whether the first of each parameter's fp32 copies round to its weights; True where that cannot be told."""
        if masters is None or masters.dtype != "float32" or not masters.is_contiguous:
            return True
        for parameter, start in zip(members, starts, strict=True):
            weight = parameter.tensor
            count = min(weight.size, SAMPLE)
            if weight.is_contiguous and weight.dtype in ROUNDED and count:
                width = itemsize(weight.dtype)
                copies = self._inline.read(*masters.at(start), count * 4)
                if not rounds_to(copies, self._inline.read(*weight.at(0), count * width), weight.dtype):
                    return False
        return True


def _trained(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Parameters in the module's order, each storage once (a tied one is trained under its first name)."""
    seen: set[tuple[object, ...]] = set()
    found = []
    for parameter in parameters:
        is_new = parameter.tensor.identity not in seen and not is_buffer(parameter.local)
        if parameter.tensor.dtype in TRAINED and is_new:
            seen.add(parameter.tensor.identity)
            found.append(parameter)
    return found


def _buffer_sets(trained: Sequence[Parameter]) -> list[list[Parameter]]:
    """The parameters of each buffer of the distributed optimizer: one per virtual stage and element type.

    What is trained is a view of its buffer, so that what has a storage of its own is frozen; unless the file was
    written again by something that gave every tensor its own.
    """
    views = Counter(id(parameter.tensor.storage) for parameter in trained)
    buffered = [p for p in trained if views[id(p.tensor.storage)] > 1 or p.tensor.storage.nbytes > p.tensor.nbytes]
    sets: dict[tuple[object, ...], list[Parameter]] = {}
    for parameter in buffered or trained:
        storage = id(parameter.tensor.storage) if buffered else 0
        sets.setdefault((parameter.chunk, parameter.tensor.dtype, storage), []).append(parameter)
    return list(sets.values())


def _candidates(members: Sequence[Parameter], total: int) -> Iterator[list[int]]:
    """Starts that fill ``total`` elements: in one bucket, or as the weights lie in their common storage."""
    sizes = [math.prod(parameter.tensor.shape) for parameter in members]
    starts = aligned(sizes)
    if (starts[-1] + sizes[-1] if starts else 0) == total:
        yield starts
    if len({id(parameter.tensor.storage) for parameter in members}) == 1:
        views = [Viewed(p.tensor.start, p.tensor.size, p.local.endswith(_SHARED)) for p in members]
        yield from without_padding(views, total)
