"""Optimizers among plain values: which there are, and what their tensors' names consist of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 20
_NUMBER = re.compile(r"(?:state\.)?\d+")
_NUMBERED = re.compile(r"(?:^|\.)\d+\.[^.]+$")


FLAT_GROUPS, FLAT_STATE = "param_groups.", "state."
"""What the keys of torch's flattened optimizers begin with: ``param_groups.<parameter>.<option>`` and so on."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer by its path of keys and list positions in the values.

    ``parameters`` are the names in its groups, in their order.  ``flat``: its values are flattened, and its groups made
    from what they say of each parameter.
    """

    path: tuple[str | int, ...]
    groups: tuple[Mapping[str, Any], ...]
    parameters: tuple[str, ...]
    flat: bool = False

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"{self.name}."

    @property
    def name(self) -> str:
        """Its path as names of tensors have it."""
        return ".".join(map(str, self.path))


def optimizers_in(values: object) -> list[Optimizer]:
    """Every dict with ``param_groups`` whose groups list their ``params``, or that is flattened; the root is none."""
    found: list[Optimizer] = []
    _walk(values, (), found)
    return found


def _walk(values: object, path: tuple[str | int, ...], found: list[Optimizer]) -> None:
    if len(path) > MAX_DEPTH:
        return
    if isinstance(values, list):
        for number, item in enumerate(values):
            if isinstance(item, dict | list):  # there may be very many numbers
                _walk(item, (*path, number), found)
    if not isinstance(values, dict):
        return
    groups: Any = values.get("param_groups")
    proper = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    flat = not (proper and groups) and is_flat(values)
    if flat:
        groups = flat_groups(values)
    if path and groups and (flat or proper):
        names = tuple(str(name) for group in groups for name in group["params"])
        found.append(Optimizer(path, tuple(groups), names, flat))
        return
    for key, value in values.items():
        if isinstance(key, str):
            _walk(value, (*path, key), found)


def is_flat(values: object) -> bool:
    """Whether this is an optimizer as torch flattens it (``flatten_optimizer_state_dict``)."""
    return isinstance(values, dict) and any(type(key) is str and key.startswith(FLAT_GROUPS) for key in values)


def flat_groups(values: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """The groups of a flattened optimizer: parameters with equal options are one."""
    options: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if type(key) is str and key.startswith(FLAT_GROUPS):
            parameter, dot, option = key[len(FLAT_GROUPS) :].rpartition(".")
            if dot:
                options.setdefault(parameter, {})[option] = value
    groups: dict[str, dict[str, Any]] = {}
    for parameter, row in options.items():
        groups.setdefault(repr(row), {**row, "params": []})["params"].append(parameter)
    return list(groups.values())


def split_names(names: Iterable[str], optimizers: Iterable[Optimizer]) -> dict[str, tuple[Optimizer, str, str]]:
    """For each tensor of an optimizer: the optimizer, its parameter and the kind of state.

    The parameter is the longest one of the groups' that fits; without one, all but the last component.
    """
    known = [(optimizer, set(optimizer.parameters)) for optimizer in optimizers]
    made: dict[str, tuple[Optimizer, str, str]] = {}
    for name in names:
        for optimizer, parameters in known:
            if not name.startswith(optimizer.prefix):
                continue
            rest = name[len(optimizer.prefix) :]
            cut = rest.rfind(".")
            fitting = cut
            while fitting > 0 and rest[:fitting] not in parameters:
                fitting = rest.rfind(".", 0, fitting)
            cut = fitting if fitting > 0 else cut
            if cut > 0:
                made[name] = (optimizer, rest[:cut], rest[cut + 1 :])
            break
    return made


def with_groups(values: object) -> object:
    """Values in which flattened optimizers have ``param_groups`` too; the given ones stay as they are."""
    flat = [optimizer for optimizer in optimizers_in(values) if optimizer.flat]
    made: Any = values
    for optimizer in flat:
        made = changed(made, optimizer.path, {"param_groups": list(optimizer.groups)})
    return made


def changed(values: Any, path: Sequence[str | int], entries: Mapping[str, Any]) -> Any:
    """Values with other ``entries`` in the dict at ``path``; the given ones stay as they are."""
    if not path:
        return {**values, **entries}
    made: Any = list(values) if isinstance(values, list) else dict(values)
    made[path[0]] = changed(values[path[0]], path[1:], entries)
    return made


def numbered_groups(tensors: Iterable[str], values: object) -> dict[str, list[list[str]]]:
    """Parameters by group of each optimizer that has numbers for names, as torch's ``state_dict`` has them.

    ``values`` are looked at only where names of tensors look so.
    """
    if values is None or not any(_NUMBERED.search(name) for name in tensors):
        return {}
    return {
        optimizer.name: [[str(name) for name in group["params"]] for group in optimizer.groups]
        for optimizer in optimizers_in(values)
        if all(_NUMBER.fullmatch(name) for name in optimizer.parameters)
    }
