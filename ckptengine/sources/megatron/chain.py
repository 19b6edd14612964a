"""An optimizer's values as one optimizer, or as the chain of them that Megatron makes of it.

Megatron trains experts that are expert-parallel with an optimizer of their own, and those of the first virtual stage
with another one where that overlaps its gathering (``overlap_param_gather_with_optimizer_step``).  It keeps the values
of a chain by number and loads them into a chain of as many, never into a single optimizer.  Tensors lie the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import UnusableRequest

IS_EXPERTS = "is_expert_parallel"
_EXPERT = re.compile(r"(?:.*\.)?experts\.(?P<rest>.+)")
_BIAS = re.compile(r"(?:.*\.)?bias\d*")
_IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""What Megatron tells groups of one optimizer by."""

Values = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class Experts:
    """Which parameters the experts have, so far as groups depend on it."""

    weights: bool
    biases: bool

    @classmethod
    def among(cls, parameters: Iterable[str]) -> Experts:
        found = [match["rest"] for parameter in parameters if (match := _EXPERT.fullmatch(parameter)) is not None]
        biases = sum(_BIAS.fullmatch(name) is not None for name in found)
        return cls(len(found) > biases, biases > 0)

    def __bool__(self) -> bool:
        return self.weights or self.biases

    def fits(self, group: Values) -> bool:
        """Whether some of them belong to a group: those of biases are not decayed."""
        is_decayed = _option(group, "wd_mult") not in (0, None)
        return bool(group.get("default_config", True)) and (self.weights if is_decayed else self.biases)


@dataclass(frozen=True, slots=True)
class Links:
    """The values of each optimizer: ``outer`` is what it keeps beside those of torch's optimizer, ``inner``."""

    outer: tuple[Values, ...]
    inner: tuple[Values, ...]

    @classmethod
    def of(cls, values: Values) -> Links:
        """Those of an optimizer of any kind.  Numbers of a chain may have become text, as in torch DCP."""
        is_chain = bool(values) and all(str(key).isdecimal() for key in values)
        each = [values[key] for key in sorted(values, key=int)] if is_chain else [values]
        wrapped = [
            one if isinstance(one.get("optimizer"), dict) else {"optimizer": one}
            for one in each
            if isinstance(one, dict) and one
        ]
        outer = [{key: value for key, value in one.items() if key != "optimizer"} for one in wrapped]
        return cls(tuple(outer), tuple(one["optimizer"] for one in wrapped))

    @property
    def experts(self) -> list[Values]:
        """The groups of parallel experts."""
        return _united([[group for group in groups if group.get(IS_EXPERTS)] for groups in self._groups()])

    @property
    def others(self) -> list[Values]:
        """All other groups."""
        return _united([[group for group in groups if not group.get(IS_EXPERTS)] for groups in self._groups()])

    @property
    def stages(self) -> int:
        """How many optimizers train what is not an expert."""
        return sum(any(not group.get(IS_EXPERTS) for group in groups) for groups in self._groups())

    def arranged(self, stages: int, experts: Experts | None) -> Links:
        """The same for ``stages`` optimizers and one of the parallel experts, if there are any."""
        if experts:
            alone = self.experts or [{**group, IS_EXPERTS: True} for group in self.others if experts.fits(group)]
            lists = [*[self.others] * stages, alone]
        else:
            lists = [_merged(self.others, self.experts)] * stages
        at = [n if len(lists) == len(self.inner) else 0 for n in range(len(lists))]
        inner = [{**self.inner[n], "param_groups": list(groups)} for n, groups in zip(at, lists, strict=True)]
        return Links(tuple(self.outer[n] for n in at), tuple(inner))

    def _groups(self) -> list[list[Values]]:
        return [_groups_of(inner) for inner in self.inner]


def trains_experts(chain: Mapping[Any, Any]) -> dict[int, bool]:
    """Which optimizers of a chain train parallel experts, so far as their groups say."""
    links = {number: link for number, link in chain.items() if type(number) is int and isinstance(link, dict)}
    groups = {number: _groups_of(link.get("optimizer", link)) for number, link in links.items()}
    known = {number: [group[IS_EXPERTS] for group in found if IS_EXPERTS in group] for number, found in groups.items()}
    return {number: any(flags) for number, flags in known.items() if flags}


def _groups_of(inner: object) -> list[Values]:
    """The groups of parameters of an optimizer, without its counter and its parameters."""
    groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
    found = [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [{key: value for key, value in group.items() if key not in ("step", "params")} for group in found]


def _option(group: Values, key: str) -> Any:
    return group.get(key, group.get(f"pre_{key}"))


def _identity(group: Values) -> tuple[Any, ...]:
    return tuple(_option(group, key) for key in _IDENTITY)


def _united(lists: Iterable[Sequence[Values]]) -> list[Values]:
    """The groups of several optimizers, without those that an earlier one has too."""
    found: list[Values] = []
    for groups in lists:
        found += [group for group in groups if group not in found]
    return found


def _merged(others: Sequence[Values], experts: Sequence[Values]) -> list[Values]:
    """Groups in which experts are parameters like all others."""
    merged = list(others)
    for group in ({**group, IS_EXPERTS: False} for group in experts):
        alike = [other for other in others if _identity(other) == _identity(group)]
        if alike and {**alike[0], IS_EXPERTS: False} != group:
            differ = sorted(str(key) for key in {*group, *alike[0]} if group.get(key) != alike[0].get(key))
            raise UnusableRequest(
                f"the optimizer's groups of experts and of other parameters differ in {', '.join(differ)}, and a job "
                "without expert parallelism has one group for both; keep the experts parallel (--layout ep=N)"
            )
        if not alike:
            merged.append(group)
    return merged
