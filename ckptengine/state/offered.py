"""Plain values of another format's checkpoint, offered to a live state: what has its name and kind is taken.

Such a checkpoint holds much that no live state asks for, and says things as its framework does.  So nothing here is a
problem: options of an optimizer's groups, objects such as schedulers, extra states of modules and plain values take
what was saved under their own key where it is of their kind, and else stay as they are.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckptengine.errors import CheckpointError
from ckptengine.state import names, objects
from ckptengine.state.assign import assign
from ckptengine.state.context import Context, below
from ckptengine.state.encoding import Encoder
from ckptengine.state.optimizers import HOW_NOT_WHAT, NOT_VALUES, OptimizerView, ParameterEntry
from ckptengine.state.sharded import PerRank, Sharded

log = logging.getLogger("ckptengine")

Put = Callable[[Any], object]
"""Sets the place of a value anew, where what is there cannot be changed itself."""

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, tuple, deque)


class Unfit(Exception):
    """What is offered is of another kind than what is live."""


def offer(context: Context, live: Any, values: object, is_structural: Callable[[Any], bool]) -> None:
    """Plan that ``live``, a whole state, takes what it can of ``values``, which are nested under the same keys.

    ``is_structural``: whether a value is, or holds, something that is matched by itself rather than replaced.
    """
    _Offer(context, is_structural).to(live, values, "", lambda value: None)


def has_groups(values: object, name: str) -> bool:
    """Whether the optimizer of this name has parameter groups among offered values."""
    try:
        path = names.split(name)
    except CheckpointError:
        return False
    for part in (*path, "param_groups"):
        values = values.get(part) if isinstance(values, Mapping) else None
    return bool(values)


class _Offer:
    def __init__(self, context: Context, is_structural: Callable[[Any], bool]) -> None:
        self._context = context
        self._is_structural = is_structural
        self._keys = Encoder()

    def to(self, live: Any, new: Any, name: str, put: Put) -> None:
        """Offer ``new`` to what is live under ``name``."""
        context = self._context
        if not context.selection.touches(name) or isinstance(live, torch.Tensor | Sharded | PerRank):
            return
        if isinstance(live, nn.Module):
            self._extras(new, name)
        elif isinstance(live, Optimizer):
            if isinstance(new, Mapping):
                self._optimizer(context.walk.optimizers[name], new)
        elif type(live) in _MAPPINGS and (not context.selection.covers(name) or not name or self._is_structural(live)):
            for key, part in list(live.items()) if isinstance(new, Mapping) else ():
                stored = str(key) if type(key) is int and key not in new else key
                if stored in new:
                    child = below(name, self._keys.key_component(key, name))
                    self.to(part, new[stored], child, _setter(live, key))
        elif type(live) in _SEQUENCES and self._is_structural(live):
            for at, (part, offered) in enumerate(zip(live, new, strict=True)) if _as_long(live, new) else ():
                self.to(part, offered, below(name, str(at)), _setter(live, at))
        elif context.selection.covers(name):
            self._leaf(live, new, name, put)

    def _leaf(self, live: Any, new: object, name: str, put: Put) -> None:
        holder = None if isinstance(live, np.ndarray | np.generic) else objects.as_stateful(live)
        try:
            if holder is not None:
                state = _state_for(holder, new)
                self._later(objects.phase_of(live), lambda: holder.load_state_dict(state))
            else:
                value = fitted(live, new)
                self._later("others", lambda: put(assign(live, value)))
        except Unfit as reason:
            log.warning("%s stays as it is: %s", name, reason)

    def _later(self, phase: str, action: Callable[[], object]) -> None:
        self._context.found_any = True
        self._context.actions[phase].append(action)

    def _extras(self, new: Any, name: str) -> None:
        view = self._context.walk.modules[name]
        for key, owner in view.extra_owner.items() if isinstance(new, Mapping) else ():
            if key in new and not view.loads and self._context.selection.covers(below(name, key)):
                self._later("modules", _call(owner.set_extra_state, new[key]))

    def _optimizer(self, view: OptimizerView, new: Mapping[Any, Any]) -> None:
        found = new.get("param_groups")
        saved = [group for group in found if isinstance(group, Mapping)] if isinstance(found, list) else []
        rows = [[str(one) for one in group.get("params") or ()] for group in saved]
        live = [list(group.params) for group in view.groups]
        numbers: dict[str, str] = {}
        if not any(one in view.entries for row in rows for one in row):  # numbers: their order says it all
            if [len(row) for row in rows] != [len(row) for row in live]:
                return
            numbers = {n: key for row, keys in zip(rows, live, strict=True) for n, key in zip(row, keys, strict=True)}
        for index, group in enumerate(view.groups):
            params = set(group.params)
            known = [not params.isdisjoint(numbers.get(one, one) for one in row) for row in rows]
            self._group(view, index, group.live, list(itertools.compress(saved, known)))
        states = new.get("state")
        for key, state in states.items() if isinstance(states, Mapping) else ():
            entry = view.entries.get(numbers.get(str(key), str(key)))
            if entry is not None and isinstance(state, Mapping):
                self._state(view, entry, state)

    def _group(self, view: OptimizerView, index: int, live: dict[str, Any], saved: Sequence[Mapping[str, Any]]) -> None:
        """The options that every saved group of these parameters has alike, and the live group has too."""
        name = below(f"{view.name}.param_groups" if view.name else "param_groups", str(index))
        if not saved or not self._context.selection.covers(name):
            return
        for key in [key for key in live if key not in NOT_VALUES | HOW_NOT_WHAT]:
            offered = [group[key] for group in saved if key in group]
            if len(offered) != len(saved):
                continue
            if any(repr(one) != repr(offered[0]) for one in offered):
                log.warning("%s.%s stays as it is: its parameters had several values of it", name, key)
            elif not isinstance(live[key], torch.Tensor):
                self._leaf(live[key], offered[0], below(name, names.escape(key)), _setter(live, key))
            elif type(offered[0]) in (int, float):
                self._later("optimizers", _call(live[key].fill_, offered[0]))

    def _state(self, view: OptimizerView, entry: ParameterEntry, saved: Mapping[Any, Any]) -> None:
        """Counters and the like that were plain numbers, where no tensor is live or stored for them."""
        optimizer, parameter = view.optimizer, entry.parameter
        live = optimizer.state.get(parameter) or {}
        for key, value in saved.items():
            name = below(below(view.name, entry.key), self._keys.key_component(key, view.name))
            if self._context.stored(name) is not None or not self._context.selection.covers(name):
                continue
            if isinstance(live.get(key), torch.Tensor) or type(value) not in (int, float, bool, str):
                continue
            counts = key == "step" and type(optimizer).__module__.startswith("torch.optim")
            made = torch.tensor(float(value), dtype=torch.float32) if counts else value
            self._later("optimizers", lambda k=key, m=made: optimizer.state.setdefault(parameter, {}).update({k: m}))  # type: ignore[misc]


def fitted(live: Any, new: Any) -> Any:
    """``new`` in the kinds of containers that ``live`` has; `Unfit` where it is of another kind altogether."""
    if live is None or new is None:
        return new
    kind = type(live)
    if kind in _MAPPINGS and isinstance(new, Mapping):
        numbers = {str(key): key for key in live if type(key) is int}
        given = {numbers.get(key, key) if key not in live else key: part for key, part in new.items()}
        made = live.copy()  # of its kind, a default factory included
        for key, part in given.items():
            made[key] = fitted(live[key], part) if key in live else part
        return made
    if kind in _SEQUENCES and isinstance(new, _SEQUENCES):
        parts = list(new)
        if len(parts) == len(live):
            parts = [fitted(a, b) if isinstance(a, _MAPPINGS) else b for a, b in zip(live, parts, strict=True)]
        return deque(parts, live.maxlen) if kind is deque else kind(parts)
    numbers_both = {kind, type(new)} <= {int, float}
    if numbers_both or kind is type(new):
        return new
    raise Unfit(f"here it is of type {kind.__name__}, in the checkpoint of type {type(new).__name__}")


def _state_for(holder: objects.Stateful, new: object) -> Any:
    """What an object takes back: what is offered, if it has the entries that the object's own state has."""
    now = holder.state_dict()
    if not isinstance(now, dict) or not isinstance(new, Mapping) or set(map(str, now)) != set(map(str, new)):
        raise Unfit(f"what the checkpoint has under this name is no state of a {type(holder).__name__} as it is here")
    return fitted(now, new)


def _as_long(live: Any, new: object) -> bool:
    return isinstance(new, list | tuple) and len(new) == len(live)


def _setter(holder: Any, key: Any) -> Put:
    def put(value: Any) -> None:
        if not isinstance(holder, tuple) and holder[key] is not value:
            holder[key] = value

    return put


def _call(function: Callable[[Any], object], value: object) -> Callable[[], object]:
    return lambda: function(value)
