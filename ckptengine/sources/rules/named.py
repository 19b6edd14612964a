"""A numbered optimizer shown under the names of its weights, as the ``groups`` of a rule file say.

torch's ``state_dict`` numbers parameters through all groups.  Which weights a group has is not recorded, so the file
says it: their names in order, or a pattern for those that follow one another in the order of the model, where that was
kept (safetensors sorts names).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptengine.errors import NotFound, RuleError
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.optimizers import Optimizer, changed, optimizers_in, split_names
from ckptengine.sources.port import KeepsOrder, Source, Verifying
from ckptengine.sources.rules.language import Group
from ckptengine.sources.rules.names import MODEL
from ckptengine.sources.wrapping import Wrapping, WrappingVerifying


def named(source: Source, groups: Sequence[Group], where: str) -> Source:
    """``source`` with its one numbered optimizer under names.

    Raises `RuleError` where there is none, or several; where there are other numbers of groups or of parameters than
    the patterns give; and where a state has another shape than the weight whose it would be.
    """
    return _VerifyingNamed(source, groups, where) if isinstance(source, Verifying) else _Named(source, groups, where)


class _Named(Wrapping):
    def __init__(self, base: Source, groups: Sequence[Group], where: str) -> None:
        super().__init__(base)
        self._values = base.values()
        found = [
            optimizer
            for optimizer in optimizers_in(self._values)
            if optimizer.parameters and all(map(str.isdecimal, optimizer.parameters))
        ]
        if len(found) != 1:
            raise RuleError(
                f"{where}: groups name the parameters of one optimizer that numbers them, and {base.files.root} has "
                f"{len(found)}; leave groups out"
            )
        self._optimizer = found[0]
        self._parameters = _parameters(base, self._optimizer, groups, where)
        self._shown: dict[str, str] = {}
        states = split_names(base.names(), found)
        for name in base.names():
            owner = states.get(name)
            parameter = self._parameters.get(owner[1]) if owner is not None else None
            if owner is None or parameter is None:
                self._shown[name] = name
                continue
            _check_shape(base.tensor(name), base.tensor(f"{MODEL}.{parameter}"), where)
            self._shown[f"{self._optimizer.prefix}{parameter}.{owner[2]}"] = name

    def names(self) -> Sequence[str]:
        return list(self._shown)

    def tensor(self, name: str) -> LogicalTensor:
        base = self._shown.get(name)
        if base is None:
            raise NotFound(f"{self._base.files.root} has no tensor {name!r}")
        return replace(self._base.tensor(base), name=name)

    def aliases(self) -> Mapping[str, str]:
        back = {base: name for name, base in self._shown.items()}
        return {back.get(alias, alias): back.get(owner, owner) for alias, owner in self._base.aliases().items()}

    def values(self) -> object:
        values: Any = self._values
        state = functools.reduce(lambda inner, key: inner[key], self._optimizer.path, values).get("state")
        groups = [
            {**group, "params": [self._parameters[str(number)] for number in group["params"]]}
            for group in self._optimizer.groups
        ]
        entries: dict[str, object] = {"param_groups": groups}
        if isinstance(state, dict):
            entries["state"] = {self._parameters.get(str(key), key): part for key, part in state.items()}
        return changed(values, self._optimizer.path, entries)


class _VerifyingNamed(_Named, WrappingVerifying):
    """Of a source whose files carry checksums."""


def _parameters(base: Source, optimizer: Optimizer, groups: Sequence[Group], where: str) -> dict[str, str]:
    """The name of each number.  A weight belongs to the first group whose pattern it matches."""
    if len(groups) != len(optimizer.groups):
        raise RuleError(f"{where}: {len(groups)} groups, but the optimizer has {len(optimizer.groups)}")
    patterns = [group for group in groups if isinstance(group, re.Pattern)]
    if patterns and not (isinstance(base, KeepsOrder) and base.keeps_order):
        raise RuleError(
            f"{where}: groups has a pattern, {patterns[0].pattern!r}, and {base.files.root} does not keep the order "
            "of the model; list each group's weights by name, as [name for name, _ in model.named_parameters()] has it"
        )
    aliases = base.aliases()
    weights = [name.removeprefix(f"{MODEL}.") for name in base.names() if name.startswith(f"{MODEL}.")]
    there = set(weights)
    free = [name for name in weights if f"{MODEL}.{name}" not in aliases]
    made: dict[str, str] = {}
    for number, (group, saved) in enumerate(zip(groups, optimizer.groups, strict=True)):
        if isinstance(group, tuple):
            found = list(group)
            absent = next((name for name in found if name not in there), None)
            if absent is not None:
                raise RuleError(f"{where}: group {number} lists {absent!r}, and there is no such weight")
        else:
            found = [name for name in free if group.fullmatch(name)]
        taken = set(found)
        free = [name for name in free if name not in taken]
        numbers = [str(one) for one in saved["params"]]
        if len(found) != len(numbers):
            raise RuleError(
                f"{where}: group {number} has {len(numbers)} parameters in the checkpoint and {len(found)} here "
                f"({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}); leave out what the optimizer does not "
                "have: buffers, frozen weights, other groups'"
            )
        made |= zip(numbers, found, strict=True)
    if len(set(made.values())) != len(made):
        raise RuleError(f"{where}: groups lists a weight twice")
    return made


def _check_shape(state: LogicalTensor, weight: LogicalTensor, where: str) -> None:
    if state.shape and state.shape != weight.shape:
        raise RuleError(
            f"{where}: {state.name} has shape {list(state.shape)} and {weight.name}, whose it would be, "
            f"{list(weight.shape)}; the groups list other weights than the optimizer was given"
        )
