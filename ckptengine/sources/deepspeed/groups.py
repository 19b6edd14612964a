"""Flat parameter groups of the optimizer files: masters and optimizer states by parameter.

A stage is given as `Group`s: for each of the optimizer's flat buffers what lies where in it.  ZeRO-1 and -2 cut a whole
group evenly over the ranks, so that parameters cross ranks; ZeRO-3 cuts each parameter by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Chunk, Flat, Held, Whole, cut_evenly, flat, number
from ckptengine.sources.stored import StoredTensor

Chunks = Callable[[Sequence[StoredTensor]], list[Chunk]]
Item = TypeVar("Item")
MASTER = "master"


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter of a group: its name and shape, and how its elements lie in the ranks' flat buffers."""

    name: str
    shape: tuple[int, ...]
    chunks: Chunks


@dataclass(frozen=True, slots=True)
class Group:
    """One flat group on all ranks that share it: fp32 buffers, and the state dictionaries of the base optimizer."""

    members: tuple[Member, ...]
    masters: tuple[StoredTensor, ...]
    states: tuple[Mapping[Any, Any], ...]
    options: Mapping[Any, Any] = field(default_factory=dict)


def entries(groups: Sequence[Group], inline: InlineFiles) -> Iterator[tuple[str, str, Held]]:
    """(parameter, state, what is held) for every master copy and optimizer state."""
    for group in groups:
        scalars, buffers = _states(group, inline)
        for member in group.members:
            yield member.name, MASTER, flat(member.name, member.shape, member.chunks(group.masters))
            for key, tensors in buffers.items():
                yield member.name, key, flat(f"{key} of {member.name}", member.shape, member.chunks(tensors))
            for key, scalar in scalars.items():
                yield member.name, key, scalar


def _states(group: Group, inline: InlineFiles) -> tuple[dict[str, Held], dict[str, list[StoredTensor]]]:
    """The states that all parameters of the group share, and those that are flat buffers like the master's."""
    scalars: dict[str, Held] = {}
    buffers: dict[str, list[StoredTensor]] = {}
    first = group.states[0] if group.states else {}
    for key, value in first.items():
        name = str(key)
        if isinstance(value, StoredTensor):
            on_ranks = [state.get(key) for state in group.states]
            if not all(isinstance(tensor, StoredTensor) for tensor in on_ranks):
                raise UnreadableFormat(f"optimizer state {name!r} is a tensor on some ranks only")
            tensors = [tensor for tensor in on_ranks if isinstance(tensor, StoredTensor)]
            if value.shape == () or (value.size == 1 and name == "step"):
                scalars[name] = Whole(_as_scalar(value))
            elif len(tensors) == len(group.masters):
                buffers[name] = tensors
        elif name == "step" and (held := number(value, inline)) is not None:
            scalars[name] = held
    if "step" not in scalars and (held := number(group.options.get("step"), inline)) is not None:
        scalars["step"] = held
    return scalars, buffers


def _as_scalar(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.storage, tensor.dtype, tensor.start, (), ())


# ZeRO-1 and ZeRO-2


def even_group(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    paddings: Sequence[int] | None,
    masters: Sequence[StoredTensor],
    states: Sequence[Mapping[Any, Any]],
    unit: int,
    options: Mapping[Any, Any],
) -> Group:
    """A group whose flat buffer is cut into ``unit`` elements per rank; ``paddings`` follow each parameter."""
    members: list[Member] = []
    position = 0
    for number_, (name, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        members.append(Member(name, shape, _Even(position, size, unit)))
        position += size + (paddings[number_] if paddings is not None and number_ < len(paddings) else 0)
    held = unit * len(masters)
    if position > held:
        raise Damaged(f"{where}: the parameters need {position} elements, but {len(masters)} ranks hold {held}")
    return Group(tuple(members), tuple(masters), tuple(states), options)


def dealt(names: Sequence[Item], ranks: int) -> list[Item]:
    """The order of round-robin gradients: a group's parameters are dealt out to the ranks like cards."""
    return [names[at] for at in _dealing(len(names), ranks)]


def dealt_back(names: Sequence[Item], ranks: int) -> list[Item]:
    """The inverse of `dealt`."""
    return [name for _, name in sorted(zip(_dealing(len(names), ranks), names, strict=True), key=lambda pair: pair[0])]


def _dealing(count: int, ranks: int) -> list[int]:
    return [at for rank in range(ranks) for at in range(rank, count, ranks)]


@dataclass(frozen=True, slots=True)
class _Even:
    position: int
    size: int
    unit: int

    def __call__(self, buffers: Sequence[StoredTensor]) -> list[Chunk]:
        return cut_evenly(self.position, self.size, self.unit, buffers)


def check_mapping(where: str, group: Group, mappings: Sequence[object]) -> None:
    """Compare with ``param_slice_mappings``, which says where each parameter starts on each rank."""
    for rank, mapping in enumerate(mappings):
        if not isinstance(mapping, dict):
            return
        for member in group.members:
            address = mapping.get(member.name)
            if not isinstance(member.chunks, _Even):
                return
            here = [chunk.at for chunk in member.chunks(group.masters) if chunk.buffer is group.masters[rank]]
            start = address.get("start") if address is not None and hasattr(address, "get") else None
            if (start if address is not None else None) != (here[0] if here else None):
                raise UnreadableFormat(
                    f"{where}: {member.name} should start at element {here[0] if here else 'none'} of rank {rank}'s "
                    f"partition by the order of the parameters, but its slice mapping says {start}"
                )


# ZeRO-3


def sliced_group(
    where: str,
    shapes: Mapping[str, tuple[int, ...]],
    masters: Sequence[StoredTensor],
    states: Sequence[Mapping[Any, Any]],
    options: Mapping[Any, Any],
) -> Group:
    """A sub-group in which each parameter is cut by itself, the last ranks' pieces padded to the common length."""
    ranks = len(masters)
    members: list[Member] = []
    at = 0
    for name, shape in shapes.items():
        piece = -(-math.prod(shape) // ranks)
        members.append(Member(name, shape, _Sliced(at, math.prod(shape), piece)))
        at += piece
    for rank, master in enumerate(masters):
        if master.size < at:
            raise Damaged(f"{where}: the parameters need {at} elements per rank, but rank {rank} holds {master.size}")
    return Group(tuple(members), tuple(masters), tuple(states), options)


@dataclass(frozen=True, slots=True)
class _Sliced:
    at: int
    size: int
    piece: int

    def __call__(self, buffers: Sequence[StoredTensor]) -> list[Chunk]:
        chunks = []
        for rank, buffer in enumerate(buffers):
            count = max(0, min(self.piece, self.size - rank * self.piece))
            chunks.append(Chunk(buffer, self.at, rank * self.piece, count))
        return chunks


def sliced(name: str, shape: tuple[int, ...], pieces: Sequence[StoredTensor]) -> Held:
    """A tensor of which each rank holds an equally long (padded) piece of its own, as ZeRO-3's frozen ones."""
    size = math.prod(shape)
    if not size:
        return Flat(pieces[0].dtype, shape, ())
    return flat(name, shape, _Sliced(0, size, -(-size // max(1, len(pieces))))(pieces))
