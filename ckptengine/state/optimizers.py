"""An optimizer by parameter name: its groups, and the state of each of its parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from ckptengine.errors import UnsupportedValue
from ckptengine.state.encoding import where
from ckptengine.state.fsdp1 import Cut
from ckptengine.state.tensors import Described, describe

NOT_VALUES = frozenset({"params", "param_names"})
"""Keys of a parameter group that are not hyper-parameters."""

HOW_NOT_WHAT = frozenset({"foreach", "fused", "capturable"})
"""Hyper-parameters that say how this process computes, not what: the live ones are kept on restore."""


class ParameterEntry(NamedTuple):
    """A parameter of the state: its full name, the name of the module (or top-level key) it is in, and its name there.

    ``described`` is its layout, which its optimizer state follows.  ``cut`` and ``here``: see
    `ckptengine.state.fsdp1.FlatPart`.
    """

    parameter: torch.Tensor
    name: str
    root: str
    key: str
    described: Described
    cut: Cut | None = None
    here: bool = True

    def part_of(self, state: torch.Tensor) -> torch.Tensor:
        """What of a state tensor of ``parameter`` is this one's."""
        return state if self.cut is None or tuple(state.shape) != (self.cut.total,) else self.cut.of(state)


@dataclass(frozen=True, slots=True)
class Group:
    """One parameter group: the ordered names of its parameters and the live group."""

    params: tuple[str, ...]
    live: dict[str, Any]


@dataclass(frozen=True, slots=True)
class OptimizerView:
    """An optimizer by name.  ``entries`` maps each parameter's name below the optimizer to the parameter."""

    optimizer: Optimizer
    name: str
    groups: tuple[Group, ...]
    entries: Mapping[str, ParameterEntry]

    @property
    def ids(self) -> tuple[int, ...]:
        """``id`` of the optimizer, and of the one it wraps (Accelerate's wrapper keeps it in ``optimizer``)."""
        inner = getattr(self.optimizer, "optimizer", None)
        return (id(self.optimizer), id(inner)) if isinstance(inner, Optimizer) else (id(self.optimizer),)


def view(optimizer: Optimizer, name: str, parameters: Mapping[int, Sequence[ParameterEntry]]) -> OptimizerView:
    """Name every parameter of ``optimizer`` by where it sits in the state.

    All from one module: by its name in the module (``layers.0.weight``).  From several: by its full name in the state.
    A parameter that is nowhere in the state goes by the name that ``Optimizer(named_parameters)`` recorded; without
    one it is an `UnsupportedValue`, because a position is no name.
    """
    rows: list[list[ParameterEntry]] = []
    for index, group in enumerate(optimizer.param_groups):
        recorded = group.get("param_names")
        row: list[ParameterEntry] = []
        for position, parameter in enumerate(group["params"]):
            found = parameters.get(id(parameter))
            if found is None and recorded is not None:
                key = str(recorded[position])
                found = [ParameterEntry(parameter, key, "", key, describe(parameter, f"{name}.{key}"))]
            if found is None:
                raise UnsupportedValue(
                    f"{where(name)}: parameter {position} of group {index} (shape {tuple(parameter.shape)}) is in no "
                    f"module or tensor of the state, so it has no name; put its module into the state too, or build "
                    f"the optimizer from model.named_parameters()"
                )
            row.extend(found)
        rows.append(row)
    one_root = len({entry.root for row in rows for entry in row}) <= 1
    groups: list[Group] = []
    entries: dict[str, ParameterEntry] = {}
    for row, live in zip(rows, optimizer.param_groups, strict=True):
        for entry in row:
            key = entry.key if one_root else entry.name
            if entries.setdefault(key, entry) is not entry:
                raise UnsupportedValue(f"{where(name)}: two parameters are called {key!r}; give their modules names")
        groups.append(Group(tuple(entry.key if one_root else entry.name for entry in row), live))
    return OptimizerView(optimizer, name, tuple(groups), entries)


def check_custom(optimizer: Optimizer, name: str, present: Collection[int]) -> None:
    """Refuse an optimizer whose own ``state_dict`` holds more than ``optimizer.state`` and its groups.

    State is saved and restored through those two; what a subclass or a hook adds beside would be lost in silence, and
    so would the state of an optimizer that it wraps, unless that is ``present`` (by ``id``) in the state too.
    """
    hooks = getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    inner = [key for key, held in vars(optimizer).items() if _is_apart(held, optimizer) and id(held) not in present]
    if type(optimizer).state_dict is Optimizer.state_dict and not hooks:
        if inner:  # SAM's base_optimizer, of which its own state_dict() says nothing
            raise UnsupportedValue(
                f"{where(name)}: {type(optimizer).__qualname__} keeps state in .{inner[0]}, which its state_dict() "
                f"leaves out; put that optimizer into the state too"
            )
        return
    try:
        state = optimizer.state_dict()
    except Exception as refused:  # some refuse it on principle; their state is in optimizer.state all the same
        if inner:  # but not a wrapper's, which is in what it wraps: ZeroRedundancyOptimizer, before it consolidates
            raise UnsupportedValue(
                f"{where(name)}: {type(optimizer).__qualname__} keeps its state in .{inner[0]}; put that optimizer "
                f"into the state instead, on every rank (its own state_dict() refused: {refused})"
            ) from refused
        return
    extra = sorted(str(key) for key in set(state) - {"state", "param_groups"})
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored = state.get("state") or {}
    hidden = any(
        isinstance(index, int)
        and index < len(order)
        and isinstance(parts, dict)
        and _has_more(parts, optimizer.state.get(order[index]) or {})
        for index, parts in stored.items()
    )
    if extra or hidden:
        what = f"the entries {extra}" if extra else "state that optimizer.state does not have"
        raise UnsupportedValue(
            f"{where(name)}: state_dict() of {type(optimizer).__qualname__} has {what}, which cannot be kept by "
            f"parameter name; put the inner optimizer into the state, and what is left beside it"
        )


def _has_more(parts: dict[Any, Any], own: dict[Any, Any]) -> bool:
    """Whether ``parts`` are more than a parameter's ``own`` state, some of it perhaps in a dict of its own."""
    return any(
        key not in own and not (isinstance(part, dict) and all(own.get(k) is inner for k, inner in part.items()))
        for key, part in parts.items()
    )


def _is_apart(held: object, optimizer: Optimizer) -> bool:
    """Whether an attribute of ``optimizer`` is another one with a state of its own."""
    return isinstance(held, Optimizer) and held is not optimizer and held.state is not optimizer.state


def describe_state(value: torch.Tensor, name: str, parameter: Described, *, meta_ok: bool = False) -> Described:
    """An optimizer's state tensor: of its parameter's layout where it has the shape of the parameter's local part."""
    found = describe(value, name, meta_ok=meta_ok)
    if found.sharding is not None or parameter.sharding is None or not found.global_shape:
        return found
    if found.global_shape != tuple(parameter.tensor.shape):
        return found
    return Described(found.tensor, found.dtype, parameter.global_shape, parameter.sharding, parameter.pieces)


def bare_entry(tensor: torch.Tensor, name: str, described: Described) -> ParameterEntry:
    """A parameter that hangs in a container: its root is the top-level key."""
    head, _, tail = _split_head(name)
    return ParameterEntry(tensor, name, head if tail else "", tail or head, described)


def _split_head(name: str) -> tuple[str, str, str]:
    """The first component of a name, and the rest."""
    position = 0
    while position < len(name):
        if name[position] == "\\":
            position += 2
        elif name[position] == ".":
            return name[:position], ".", name[position + 1 :]
        else:
            position += 1
    return name, "", ""
