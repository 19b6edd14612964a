"""What a conversion's tensors are to DeepSpeed: parameters in groups, their states, frozen parameters, buffers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.optimizers import Optimizer, optimizers_in, split_names
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Job

MASTER, STEP = "master", "step"
_MODEL = "model."
_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that the optimizer updates.

    ``master`` is the tensor that becomes its fp32 copy (the weight itself where there is no other), ``states`` the
    tensors of its shape by state, ``scalars`` its counters and other single numbers.
    """

    name: str
    shape: tuple[int, ...]
    master: str
    states: Mapping[str, str]
    scalars: Mapping[str, str]

    @property
    def step(self) -> str | None:
        """Its counter."""
        return self.scalars.get(STEP)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group: its options without ``params``, and its parameters in order."""

    options: Mapping[str, Any]
    members: tuple[Trained, ...]

    @property
    def size(self) -> int:
        return sum(member.size for member in self.members)

    @property
    def first(self) -> Trained | None:
        """The first parameter that has elements."""
        return next((member for member in self.members if member.size), None)

    @property
    def keys(self) -> tuple[str, ...]:
        """The states that every parameter of the group has."""
        return tuple(self.first.states) if self.first is not None else ()


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that is written, by name without ``model.``: weights, and which of them are what.

    ``others`` are tensors of neither the model nor the optimizer, by their whole names; DeepSpeed's client state.
    """

    weights: Mapping[str, str]
    groups: tuple[Group, ...]
    frozen: tuple[str, ...]
    buffers: tuple[str, ...]
    aliases: Mapping[str, str]
    values: Mapping[str, Any]
    optim: Mapping[str, Any]
    others: tuple[str, ...] = ()

    @property
    def trained(self) -> list[Trained]:
        return [member for group in self.groups for member in group.members]

    @property
    def has_settings(self) -> bool:
        """Whether the groups know their learning rates and so on: elastic checkpoints and mere weights do not."""
        return any(set(group.options) - {STEP} for group in self.groups)


def training_of(job: Job) -> Training:
    """Sort a conversion's tensors; `UnusableRequest` for what DeepSpeed cannot hold."""
    plain = plain_values(job)
    values: dict[str, Any] = dict(plain) if isinstance(plain, dict) else {} if plain is None else {"values": plain}
    names = [name for name in job.names if name not in job.aliases]
    weights = {name[len(_MODEL) :]: name for name in names if name.startswith(_MODEL)}
    optimizer = _optimizer(values)
    states = _states(names, optimizer)
    if not weights and not states:
        raise UnusableRequest("there is nothing under model. to write for DeepSpeed; rename the weights with rules")
    groups = _groups(job, weights, states, optimizer)
    trained = {member.name for group in groups for member in group.members}
    rest = [name for name in weights if name not in trained]
    frozen = _frozen(job, rest, values, has_optimizer=optimizer is not None)
    aliases = {
        alias[len(_MODEL) :]: owner[len(_MODEL) :]
        for alias, owner in job.aliases.items()
        if alias.startswith(_MODEL) and owner.startswith(_MODEL)
    }
    taken = {*weights.values(), *(name for parts in states.values() for name in parts.values())}
    optim = values.pop(optimizer.name, {}) if optimizer is not None else values.pop("optim", {})
    return Training(
        weights=weights,
        groups=tuple(groups),
        frozen=tuple(name for name in rest if name in frozen),
        buffers=tuple(name for name in rest if name not in frozen),
        aliases=aliases,
        values=values,
        optim=optim if isinstance(optim, dict) else {},
        others=tuple(name for name in names if name not in taken),
    )


def without_empty(training: Training) -> Training:
    """Without the trained parameters that have no elements, which ZeRO and 16-bit training count as not trained."""
    groups = [
        Group(group.options, tuple(member for member in group.members if member.size)) for group in training.groups
    ]
    left = {member.name for group in groups for member in group.members}
    empty = [member.name for member in training.trained if member.name not in left and member.name in training.weights]
    kept = tuple(group for group in groups if group.members)
    return dataclasses.replace(training, groups=kept, frozen=(*training.frozen, *empty)) if empty else training


def check_counters(job: Job, training: Training) -> None:
    """Refuse groups whose parameters count differently, since a flat group has one counter; reads single numbers."""
    for number, group in enumerate(training.groups):
        for key, first in (group.first.scalars if group.first is not None else {}).items():
            seen: dict[object, bytes] = {}
            for member in filter(lambda member: member.size, group.members):
                place = [(f.file, f.offset) for f in job.tensor(member.scalars[key]).fragments]
                if str(place) in seen:
                    continue
                seen[str(place)] = _scalar_bytes(job, member.scalars[key])
                if seen[str(place)] != seen[next(iter(seen))]:
                    raise UnusableRequest(
                        f"group {number} of the optimizer: {member.scalars[key]} differs from {first}; ZeRO keeps one "
                        f"{key} for all parameters of a group. Write it without ZeRO (zero=0)"
                    )


def _scalar_bytes(job: Job, name: str) -> bytes:
    tensor = job.tensor(name)
    data = bytearray(tensor.nbytes)
    job.read(name, Box((0,) * len(tensor.shape), tensor.shape), memoryview(data))
    return bytes(data)


def _optimizer(values: Mapping[str, Any]) -> Optimizer | None:
    found = [optimizer for optimizer in optimizers_in(dict(values)) if len(optimizer.path) == 1]
    if len(found) > 1:
        names = ", ".join(optimizer.name for optimizer in found)
        raise UnusableRequest(f"a DeepSpeed checkpoint holds one optimizer and this has {names}; drop one by rules")
    return found[0] if found and any(found[0].parameters) else None


def _states(names: Sequence[str], optimizer: Optimizer | None) -> dict[str, dict[str, str]]:
    """Parameter -> state -> the tensor's name."""
    if optimizer is not None:
        taken = {name: (part[1], part[2]) for name, part in split_names(names, [optimizer]).items()}
    else:
        taken = {}
        for name in names:
            parameter, _, state = name.removeprefix("optim.").rpartition(".")
            if name.startswith("optim.") and parameter:
                taken[name] = (parameter, state)
    found: dict[str, dict[str, str]] = {}
    for name, (parameter, state) in taken.items():
        found.setdefault(parameter, {})[state] = name
    return found


def _groups(
    job: Job, weights: Mapping[str, str], states: Mapping[str, Mapping[str, str]], optimizer: Optimizer | None
) -> list[Group]:
    if optimizer is None:
        members = list(states) or [name for name in weights if job.tensor(weights[name]).dtype in _FLOATS]
        made: list[tuple[dict[str, Any], list[str]]] = [({}, members)] if members else []
    else:
        made = [
            ({key: value for key, value in group.items() if key != "params"}, [str(name) for name in group["params"]])
            for group in optimizer.groups
        ]
    groups = [
        Group(options, tuple(_trained(job, name, weights, states.get(name, {})) for name in members))
        for options, members in made
        if members
    ]
    for number, group in enumerate(groups):
        first = group.first or group.members[0]
        for member in filter(lambda member: member.size, group.members):
            if set(member.states) != set(group.keys) or set(member.scalars) != set(first.scalars):
                raise UnusableRequest(
                    f"group {number} of the optimizer: {member.name} has the states {_listed(member)} and "
                    f"{first.name} has {_listed(first)}; DeepSpeed keeps the same for all"
                )
    return groups


def _listed(member: Trained) -> str:
    return ", ".join([*member.states, *member.scalars]) or "none"


def _trained(job: Job, name: str, weights: Mapping[str, str], states: Mapping[str, str]) -> Trained:
    master = states.get(MASTER, weights.get(name))
    if master is None:
        remedy = (
            "torch numbers parameters: say in a rule file which weights each group has (groups = [...]), or "
            "restore the checkpoint into its model and optimizer (ce.load, or Checkpointer(start_from=)), save, and "
            "convert that"
        )
        raise UnusableRequest(
            f"the optimizer's groups name {name!r}, whose weight and master copy are both missing"
            + (f"; {remedy}" if name.isdecimal() else "")
        )
    header = job.tensor(master)
    if header.dtype not in _FLOATS or header.dtype == "float64":
        raise UnusableRequest(f"{name} is {header.dtype}; DeepSpeed trains float32, bfloat16 and float16 only")
    shaped: dict[str, str] = {}
    scalars: dict[str, str] = {}
    for state, tensor_name in states.items():
        tensor: LogicalTensor = job.tensor(tensor_name)
        if tensor.size == 1 and (state == STEP or (not tensor.shape and header.shape)):
            scalars[state] = tensor_name
        elif state != MASTER:
            if tensor.shape != header.shape or tensor.dtype not in _FLOATS:
                raise UnusableRequest(
                    f"{tensor_name} is {tensor.dtype} {list(tensor.shape)}; DeepSpeed keeps states of the parameter's "
                    f"own shape {list(header.shape)} in flat fp32 buffers"
                )
            shaped[state] = tensor_name
    return Trained(name, header.shape, master, dict(sorted(shaped.items())), dict(sorted(scalars.items())))


def _frozen(job: Job, rest: Sequence[str], values: Mapping[str, Any], *, has_optimizer: bool) -> set[str]:
    """Which of the tensors that are not trained are parameters.

    The source may say (``buffer_names``), the user may (option ``frozen``, a regular expression); else all are buffers.
    """
    pattern = job.options.get("frozen")
    if isinstance(pattern, str):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UnusableRequest(f"option frozen = {pattern!r} is not a regular expression: {error}") from None
        return {name for name in rest if compiled.fullmatch(name)}
    known = values.get("buffer_names")
    if isinstance(known, list) and has_optimizer:
        return set(rest) - {str(name) for name in known}
    return set()
