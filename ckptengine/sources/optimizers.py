"""Optimizers among plain values: which there are, and what their tensors' names consist of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 20
_NUMBER = re.compile(r"(?:state\.)?\d+")
_NUMBERED = re.compile(r"(?:^|\.)\d+\.[^.]+$")


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer by its path in the values.  ``parameters`` are the names in its groups, in their order."""

    path: tuple[str, ...]
    groups: tuple[Mapping[str, Any], ...]
    parameters: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return ".".join((*self.path, ""))


def optimizers_in(values: object) -> list[Optimizer]:
    """Every dict with ``param_groups`` whose groups list their ``params``; the values' own root is none."""
    found: list[Optimizer] = []
    _walk(values, (), found)
    return found


def _walk(values: object, path: tuple[str, ...], found: list[Optimizer]) -> None:
    if not isinstance(values, dict) or len(path) > MAX_DEPTH:
        return
    groups = values.get("param_groups")
    proper = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    if path and proper and groups:
        names = tuple(str(name) for group in groups for name in group["params"])
        found.append(Optimizer(path, tuple(groups), names))
        return
    for key, value in values.items():
        if isinstance(key, str):
            _walk(value, (*path, key), found)


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


def numbered_groups(tensors: Iterable[str], values: Callable[[], object]) -> dict[str, list[list[str]]]:
    """Parameters by group of each optimizer that has numbers for names, as torch's ``state_dict`` has them.

    ``values`` is called only where names of tensors look so.
    """
    if not any(_NUMBERED.search(name) for name in tensors):
        return {}
    return {
        ".".join(optimizer.path): [[str(name) for name in group["params"]] for group in optimizer.groups]
        for optimizer in optimizers_in(values())
        if all(_NUMBER.fullmatch(name) for name in optimizer.parameters)
    }
