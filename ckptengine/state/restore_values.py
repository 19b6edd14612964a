"""Restoring the nesting itself: containers, tensors in them, objects, and plain values."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ckptengine.state import names, objects, registry
from ckptengine.state.assign import assign
from ckptengine.state.context import (
    ABSENT,
    Absent,
    Build,
    Context,
    below,
    is_node,
    mapping_items,
    sequence_parts,
)
from ckptengine.state.encoding import Encoder, Json
from ckptengine.state.restore_modules import match_module
from ckptengine.state.restore_optimizers import match_optimizer
from ckptengine.state.sharded import PerRank, Sharded
from ckptengine.state.tensors import describe, global_rank

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_SEQUENCES = (list, tuple, deque)
_TENSORS = (torch.Tensor, Sharded)  # a tuple: a union would be made anew for each of very many tensors
_MATCHED = (torch.Tensor, Sharded, nn.Module, Optimizer, PerRank)


class Matcher:
    """Walks the live state beside the saved values and plans what commit will do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._keys = Encoder()
        self._structural: dict[int, bool] = {}
        self._per_rank: dict[str, Json] | None = None

    def match(self, live: Any, data: Json | Absent, name: str) -> Build:
        """Plan the restore of ``live`` from its saved encoding; the returned call makes the value for its place."""
        context = self.context
        if not context.selection.touches(name):
            return _keep(live)
        context.found_any = context.found_any or (bool(name) and context.selection.covers(name))
        if isinstance(live, _TENSORS):
            return self._tensor(live, data, name)
        if isinstance(live, nn.Module):
            match_module(context, context.walk.modules[name], data, name)
            return _keep(live)
        if isinstance(live, Optimizer):
            match_optimizer(context, context.walk.optimizers[name], data, self.match)
            return _keep(live)
        if isinstance(live, PerRank):
            return self._rank_value(live, data, name)
        if self.is_structural(live) or (not name and type(live) in _MAPPINGS):
            return self._structure(live, data, name)
        return self._plain(live, data, name)

    # leaves

    def _tensor(self, live: torch.Tensor | Sharded, data: Json | Absent, name: str) -> Build:
        context = self.context
        if self._stays(live, data, name) or isinstance(data, Absent) or not context.selection.covers(name):
            return _keep(live)
        if isinstance(live, Sharded):
            context.problems.append(f"{name}: a sharded tensor live, a plain value in the checkpoint")
            return _keep(live)
        value = context.decode(data)
        if isinstance(value, bool | int | float) and live.ndim == 0:  # a counter that became a tensor
            context.staged.append(lambda: live.fill_(value))
            return _keep(live)
        return _keep(value)

    def _stays(self, live: Any, data: Json | Absent, name: str) -> bool:
        """Whether ``live`` is a tensor that stays where it is, to be filled in place as far as it is selected."""
        if not isinstance(live, _TENSORS) or not (isinstance(data, Absent) or is_node(data, "tensor")):
            return False
        context = self.context
        if context.selection.covers(name):
            context.found_any = context.found_any or bool(name)
            wanted = str(data["name"]) if isinstance(data, dict) else name
            found = context.walk.found.get(name)
            same = found is not None and found.live is live and found.role != "optimizer"
            described = found.described if found is not None and same else describe(live, name, meta_ok=True)
            context.fill(name, described, live, context.stored(wanted))
        return True

    def _plain(self, live: Any, data: Json | Absent, name: str) -> Build:
        context = self.context
        if not context.selection.covers(name):
            return self._partial(live, data, name)
        if isinstance(data, Absent):
            return _keep(live)
        unknown = set(context.decoder.unknown_types)
        value = context.decode(data)
        for missing in sorted(context.decoder.unknown_types - unknown):
            context.problems.append(
                f"{name}: holds a {missing}, not known here; call ckptengine.register before restoring"
            )
        return lambda: assign(live, value)

    def _partial(self, live: Any, data: Json | Absent, name: str) -> Build:
        """Only some entries below ``name`` are selected."""
        items = mapping_items(self.context, data) if type(live) in _MAPPINGS else None
        if items is None:
            return _keep(live)
        return self._mapping(live, items, name)

    def _rank_value(self, live: PerRank, data: Json | Absent, name: str) -> Build:
        context = self.context
        if self._per_rank is None:
            saved = context.saved.rank_values
            found = saved.get("values") if isinstance(saved, dict) else None
            self._per_rank = found if isinstance(found, dict) else {}
        part = self._per_rank.get(name, ABSENT)
        if isinstance(part, Absent):
            if context.on_missing_rank == "problem" and not isinstance(data, Absent) and context.selection.covers(name):
                context.lacking(f"{name}: PerRank, and the checkpoint has no value of its own for this rank")
            return _keep(live)
        context.rank_mark = "." + names.escape(names.RankMark(global_rank()))
        try:
            build = self.match(live.value, part, name)
        finally:
            context.rank_mark = ""

        def rebuilt() -> PerRank:
            value = build()
            return live if value is live.value else PerRank(value)

        return rebuilt

    # structure

    def is_structural(self, live: Any) -> bool:
        """Whether ``live`` is, or holds, something that must be matched one by one rather than replaced."""
        if isinstance(live, _MATCHED):
            return True
        known = self._structural.get(id(live))
        if known is None:
            parts = _parts_of(live)
            known = any(self.is_structural(part) for part in parts) if parts is not None else _is_object(live)
            self._structural[id(live)] = known
        return known

    def _structure(self, live: Any, data: Json | Absent, name: str) -> Build:
        if type(live) in _MAPPINGS:
            items = ABSENT if isinstance(data, Absent) else mapping_items(self.context, data)
            return self._mismatch(live, name, "mapping") if items is None else self._mapping(live, items, name)
        if type(live) in _SEQUENCES:
            parts = ABSENT if isinstance(data, Absent) else sequence_parts(data)
            return self._mismatch(live, name, "sequence") if parts is None else self._sequence(live, parts, name)
        if registry.is_structured(type(live)):
            fields: Any = ABSENT
            if isinstance(data, dict) and data.get("$") in ("namedtuple", "dataclass"):
                fields = data.get("fields")
            elif not isinstance(data, Absent):
                return self._mismatch(live, name, type(live).__qualname__)
            return self._fields(live, fields, name)
        return self._object(live, data, name)

    def _mismatch(self, live: Any, name: str, what: str) -> Build:
        self.context.problems.append(f"{name}: a {what} with tensors or objects live, another kind in the checkpoint")
        return _keep(live)

    def _mapping(self, live: Any, items: dict[Any, Json] | Absent, name: str) -> Build:
        builds: dict[Any, Build] = {}
        for key, part in live.items():
            child = below(name, self._keys.key_component(key, name))
            data = ABSENT if isinstance(items, Absent) else items.get(key, ABSENT)
            if isinstance(data, Absent) and not isinstance(items, Absent):
                self._missing(part, child)
            elif not self._stays(part, data, child):
                builds[key] = self.match(part, data, child)
        for key in () if isinstance(items, Absent) else items:
            if key not in live:
                self.context.extra.append(below(name, self._keys.key_component(key, name)))

        def build() -> Any:
            for key, make in builds.items():
                value = make()
                if live[key] is not value:
                    live[key] = value
            return live

        return build

    def _missing(self, part: Any, name: str) -> None:
        """A live entry that the saved mapping lacks: its tensors may still be there (a source with partial values)."""
        if not self.context.selection.touches(name):
            return
        if self.is_structural(part) and _has_names_below(self.context, name):
            self.match(part, ABSENT, name)
        elif self.context.selection.covers(name):
            self.context.missing(name)

    def _sequence(self, live: Any, parts: list[Json] | Absent, name: str) -> Build:
        if isinstance(parts, Absent):
            parts = [ABSENT] * len(live)  # type: ignore[list-item]
        if len(parts) != len(live) and any(_is_fixed(part) for part in live):
            self.context.problems.append(f"{name}: {len(live)} entries live, {len(parts)} in the checkpoint")
            return _keep(live)
        builds = [
            self.match(part, data, below(name, str(i))) for i, (part, data) in enumerate(zip(live, parts, strict=False))
        ]
        more = [self.context.decode(data) for data in parts[len(live) :]]

        def build() -> Any:
            values = [*(make() for make in builds), *more]
            if len(values) == len(live) and all(a is b for a, b in zip(values, live, strict=True)):
                return live
            if isinstance(live, tuple):
                return tuple(values)
            if isinstance(live, deque):
                live.clear()
                live.extend(values)
            else:
                live[:] = values
            return live

        return build

    def _fields(self, live: Any, fields: dict[str, Json] | Absent, name: str) -> Build:
        parts = _fields_of(live)
        saved = {} if isinstance(fields, Absent) else fields
        if not isinstance(fields, Absent) and set(saved) != set(parts):
            self.context.problems.append(f"{name}: fields {sorted(saved)} in the checkpoint, {sorted(parts)} live")
            return _keep(live)
        builds = {
            key: self.match(part, saved.get(key, ABSENT), below(name, names.escape(key))) for key, part in parts.items()
        }

        def build() -> Any:
            values = {key: make() for key, make in builds.items()}
            if all(values[key] is part for key, part in parts.items()):
                return live
            if isinstance(live, tuple):
                return tuple.__new__(type(live), values.values())
            frozen = type(live).__dataclass_params__.frozen
            target = object.__new__(type(live)) if frozen else live
            for key, value in values.items():
                object.__setattr__(target, key, value)
            return target

        return build

    def _object(self, live: Any, data: Json | Absent, name: str) -> Build:
        context = self.context
        if isinstance(data, Absent) or not context.selection.covers(name):
            return _keep(live)
        part: Json = data
        if is_node(data, "object") and isinstance(data, dict):
            part = data.get("state")
            self._check_class(live, data.get("type"), name)
        value = context.decode(part)
        context.actions[objects.phase_of(live)].append(lambda: live.load_state_dict(value))
        return _keep(live)

    def _check_class(self, live: Any, stored: Json, name: str) -> None:
        """torch's schedulers take any dict without a word, so their class must be the one that was saved."""
        own = "torch.optim.lr_scheduler:"
        here = objects.class_name(live)
        if isinstance(stored, str) and stored.startswith(own) and here.startswith(own) and stored != here:
            self.context.problems.append(
                f"{name}: {stored.removeprefix(own)} in the checkpoint, {here.removeprefix(own)} live"
            )


def _keep(live: Any) -> Build:
    return lambda: live


def _parts_of(live: Any) -> list[Any] | None:
    """What a container holds; None for a value that is no container."""
    if type(live) in _MAPPINGS:
        return list(live.values())
    if type(live) in _SEQUENCES:
        return list(live)
    if not isinstance(live, type) and registry.is_structured(type(live)) and registry.codec_of(type(live)) is None:
        return list(_fields_of(live).values())
    return None


def _fields_of(live: Any) -> dict[str, Any]:
    if isinstance(live, tuple):
        return dict(zip(type(live)._fields, live, strict=True))  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(live):
        return {f.name: getattr(live, f.name) for f in dataclasses.fields(live) if hasattr(live, f.name)}
    return {}


def _is_object(live: Any) -> bool:
    return not isinstance(live, np.ndarray | np.generic) and objects.as_stateful(live) is not None


def _is_fixed(part: Any) -> bool:
    """A list with such a member cannot grow or shrink."""
    return isinstance(part, nn.Module | Optimizer | PerRank | Sharded) or _is_object(part)


def _has_names_below(context: Context, name: str) -> bool:
    prefix = f"{name}."
    return name in context.saved.tensors or any(one.startswith(prefix) for one in context.saved.tensors)
