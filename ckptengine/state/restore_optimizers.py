"""Restoring an optimizer by parameter name: state in place, missing state made, groups matched by their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckptengine.state import names
from ckptengine.state.context import Absent, Build, Context, below, is_node, mapping_items
from ckptengine.state.decoding import Decoder, loads
from ckptengine.state.dtypes import torch_dtype
from ckptengine.state.encoding import Encoder, Json
from ckptengine.state.offered import has_groups
from ckptengine.state.optimizer_kinds import DEFINES_CLASS, another_algorithm, is_same_class
from ckptengine.state.optimizers import HOW_NOT_WHAT, NOT_VALUES, OptimizerView, ParameterEntry, describe_state

Match = Callable[[Any, Json | Absent, str], Build]


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """What a checkpoint says of one optimizer.

    ``groups``: (parameter names, hyper-parameters still encoded).  ``state``: the plain state values by parameter.
    ``native``: written by this package, so that what it does not list was not there.  ``kind``: its class, where known.
    """

    groups: tuple[tuple[tuple[str, ...], dict[str, Json]], ...]
    state: dict[str, Json]
    shared: dict[Any, Json]
    native: bool
    kind: str | None = None

    def under(self, names: Mapping[str, str]) -> SavedOptimizer:
        """The same with its parameters under other names."""
        if not names:
            return self
        groups = tuple((tuple(names[key] for key in params), values) for params, values in self.groups)
        state = {names.get(str(key), str(key)): part for key, part in self.state.items()}
        return replace(self, groups=groups, state=state)


def match_optimizer(context: Context, view: OptimizerView, data: Json | Absent, match: Match) -> None:
    """Plan the restore of one optimizer."""
    saved = _read(context, view.name, data)
    if saved is None:
        context.problems.append(
            f"{view.name or 'the state itself'}: an optimizer live, a plain value in the checkpoint"
        )
        return
    positions = _by_position(context, view, saved)
    if positions is None:
        return
    saved = saved.under(positions)
    tensors = _tensors_by_parameter(context, view, positions)
    stateless = not saved.groups and not has_groups(context.saved.offered, view.name)
    if not saved.native and stateless and not any(tensors.values()):
        if context.selection.covers(view.name):
            context.lacking(f"{view.name}: the checkpoint has no state for this optimizer")
        return
    if saved.kind is not None and context.selection.covers(view.name):
        keys = [values.keys() for _, values in saved.groups]
        told = another_algorithm(view.optimizer, view.name, saved.kind, keys)
        if told is not None:
            context.lacking(told)
    _match_groups(context, view, saved, match)
    group_of = {key: group.live for group in view.groups for key in group.params}
    plain = {key: mapping_items(context, saved.state.get(key, {})) or {} for key in view.entries}
    flats = _Flats({id(entry.parameter) for key, entry in view.entries.items() if tensors[key] or plain[key]})
    for key, entry in view.entries.items():
        state = _ParameterState(context, view, saved, entry, below(view.name, key), match, group_of[key], flats)
        state.plan(tensors[key], plain[key])
    for shared_key, part in saved.shared.items():
        live = view.optimizer.state.get(shared_key)
        _set_later(context, view.optimizer.state, shared_key, match(live, part, below(view.name, "state")))


def _read(context: Context, name: str, data: Json | Absent) -> SavedOptimizer | None:
    """The node of an optimizer, or the ``param_groups`` and ``state`` of another framework's."""
    if isinstance(data, Absent):
        return SavedOptimizer((), {}, {}, False)
    native = is_node(data, "optimizer")
    items = data if native and isinstance(data, dict) else mapping_items(context, data)
    if items is None:
        return None
    groups: list[tuple[tuple[str, ...], dict[str, Json]]] = []
    listed = items.get("groups" if native else "param_groups") or []
    for group in listed if isinstance(listed, list) else []:
        parts = (group if native and isinstance(group, dict) else mapping_items(context, group)) or {}
        params = parts.get("params")
        values = mapping_items(context, parts.get("values")) if native else parts
        listed_by_name = isinstance(params, list) and all(type(one) in (str, int) for one in params)
        named = [str(one) for one in params] if isinstance(params, list) and listed_by_name else None
        if named is None or values is None:
            context.problems.append(f"{name}: the checkpoint does not say which parameters its groups have")
            return SavedOptimizer((), {}, {}, False)
        groups.append((tuple(named), values))
    state = items.get("state") if native else mapping_items(context, items.get("state"))
    shared = mapping_items(context, items.get("shared", {})) if native else None
    kind = items.get("type") if native else None
    found = SavedOptimizer(tuple(groups), state if isinstance(state, dict) else {}, shared or {}, native)
    return replace(found, kind=kind) if isinstance(kind, str) else found


NAMELESS = "state."
"""What stands before the position of a parameter that DeepSpeed kept no name of."""

_LIKE_PARAMETER = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"})
"""States of the parameter's shape, by which a wrong order of parameters is noticed."""


def _by_position(context: Context, view: OptimizerView, saved: SavedOptimizer) -> dict[str, str] | None:
    """Saved number -> live name, where the checkpoint has nothing but numbers, as torch's ``state_dict`` has them.

    Empty where it has names.  As in torch the order says it all, so that groups must be as many and as large as live
    ones; None where they are not, which is reported.
    """
    groups = [params for params, _ in saved.groups] or context.saved.numbered.get(view.name, ())
    keys = [key for params in groups for key in params]
    bare = [key.removeprefix(NAMELESS) for key in keys]
    if not keys or not all(key.isdecimal() for key in bare) or any(key in view.entries for key in keys):
        return {}
    sizes = [len(params) for params in groups]
    live = [len(group.params) for group in view.groups]
    if sizes != live or len(set(keys)) != len(keys):
        context.problems.append(
            f"{view.name}: the checkpoint numbers the optimizer's parameters, in groups of {sizes}; the live groups "
            f"have {live}; build the optimizer with the groups that it had, or restore the rest with names=[...]"
        )
        return None
    return dict(zip(keys, (name for group in view.groups for name in group.params), strict=True))


def _tensors_by_parameter(
    context: Context, view: OptimizerView, positions: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """For each parameter the stored state tensors: state key (escaped) -> the name to read."""
    prefix = f"{view.name}." if view.name else ""
    found: dict[str, dict[str, str]] = {key: {} for key in view.entries}
    for name in (*context.saved.tensors, *context.saved.aliases):
        if name.startswith(prefix):
            head, tail = _split_last(name[len(prefix) :])
            head = positions.get(head, head)
            if head in found:
                if positions and tail in _LIKE_PARAMETER and name in context.saved.tensors:
                    _check_shape(context, view, head, name)
                found[head][tail] = name
    return found


def _check_shape(context: Context, view: OptimizerView, key: str, name: str) -> None:
    shape, expected = context.saved.tensors[name][1], view.entries[key].described.global_shape
    if shape != expected:
        context.problems.append(
            f"{below(view.name, key)}: shape {expected} live; {name}, which has its number in the checkpoint, has "
            f"{shape}: build the optimizer with its parameters in the order in which it had them"
        )


def _split_last(name: str) -> tuple[str, str]:
    """A name without its last component, and that component."""
    head, _, tail = name.rpartition(".")
    while head and (len(head) - len(head.rstrip("\\"))) % 2:  # the dot was escaped
        head, _, more = head.rpartition(".")
        tail = f"{more}.{tail}"
    return head, tail


def _match_groups(context: Context, view: OptimizerView, saved: SavedOptimizer, match: Match) -> None:
    group_of = {key: index for index, (params, _) in enumerate(saved.groups) for key in params}
    renamed = saved.kind is not None and not is_same_class(view.optimizer, saved.kind)
    kept = HOW_NOT_WHAT | {DEFINES_CLASS} if renamed else HOW_NOT_WHAT
    for index, group in enumerate(view.groups):
        prefix = f"{view.name}.param_groups.{index}" if view.name else f"param_groups.{index}"
        if not saved.groups or not context.selection.covers(prefix):
            continue
        unknown = [key for key in group.params if key not in group_of]
        for key in unknown:
            context.lacking(f"{below(view.name, key)}: this parameter was not in the saved optimizer")
        sources = sorted({group_of[key] for key in group.params if key in group_of})
        if not group.params and index < len(saved.groups) and not saved.groups[index][0]:
            sources = [index]
        if not sources:
            continue
        values = saved.groups[sources[0]][1]
        if any(saved.groups[other][1] != values for other in sources[1:]):
            context.problems.append(
                f"{prefix}: its parameters come from saved groups {sources}, whose hyper-parameters differ; "
                f"group the parameters as they were"
            )
            continue
        for key, part in values.items():
            if key in NOT_VALUES or (key in kept and key in group.live):
                continue
            build = match(group.live.get(key), part, below(prefix, names.escape(key)))
            context.actions["optimizers"].append(_setter(group.live, key, build))
    live = set(view.entries)
    context.extra += [below(view.name, key) for key in group_of if key not in live]


@dataclass(frozen=True, slots=True)
class _Flats:
    """What parameters that are parts of one flat parameter share.

    ``stateful``: ``id`` of each parameter of the optimizer of which some state is saved.  ``made``: the state that is
    missing, by ``id`` of the parameter and state key: a tensor, or the encoding of a plain value.
    """

    stateful: set[int]
    made: dict[tuple[int, Any], Any] = field(default_factory=dict)


class _ParameterState:
    """The state of one parameter: what is live, what is saved, and how the one becomes the other."""

    def __init__(
        self,
        context: Context,
        view: OptimizerView,
        saved: SavedOptimizer,
        entry: ParameterEntry,
        name: str,
        match: Match,
        group: dict[str, Any],
        flats: _Flats,
    ) -> None:
        self.context, self.view, self.saved = context, view, saved
        self.entry, self.name, self.match, self.group, self.flats = entry, name, match, group, flats
        self.live: dict[Any, Any] = view.optimizer.state.get(entry.parameter) or {}
        encoder = Encoder()
        self.live_keys = {encoder.key_component(key, name): key for key in self.live}

    def plan(self, tensors: dict[str, str], plain: dict[Any, Json]) -> None:
        context = self.context
        if not self.entry.here:
            context.used.update(tensors.values())
            return
        selected = {key: name for key, name in tensors.items() if context.selection.covers(below(self.name, key))}
        if context.selection.covers(self.name) and self.saved.native and not tensors and not plain:
            if self.live:  # saved before the first step
                shared = id(self.entry.parameter) in self.flats.stateful
                context.actions["optimizers"].append(self._clear if shared else self._forget)
            return
        for key, name in selected.items():
            self._tensor(key, name)
        encoder = Encoder()
        for plain_key, part in plain.items():
            escaped = encoder.key_component(plain_key, self.name)
            if context.selection.covers(below(self.name, escaped)):
                self._plain(plain_key, part, below(self.name, escaped))
                tensors = {**tensors, escaped: ""}
        for key, live_key in self.live_keys.items():
            if key in tensors or not context.selection.covers(below(self.name, key)):
                continue
            if isinstance(self.live[live_key], torch.Tensor):
                context.missing(below(self.name, key))
            elif self.saved.native:
                context.actions["optimizers"].append(_remover(self.live, live_key))

    def _forget(self) -> None:
        self.view.optimizer.state.pop(self.entry.parameter, None)

    def _clear(self) -> None:
        """A part of a flat parameter whose other parts have state; its own is what a new one would be."""
        for part in self.live.values():
            if isinstance(part, torch.Tensor) and self.entry.part_of(part) is not part:
                self.entry.part_of(part).zero_()

    def _tensor(self, key: str, stored_name: str) -> None:
        context = self.context
        source = context.stored(stored_name)
        if source is None:
            return
        name = below(self.name, key)
        live_key = self.live_keys.get(key)
        live = self.live.get(live_key) if live_key is not None else None
        if isinstance(live, torch.Tensor):
            self._fill(live, name, source)
        elif key == "master" and not self.saved.native:
            context.used |= {stored_name, source}  # the parameter itself was filled from it where it is fp32
        elif self.entry.cut is not None:
            self._fill(self._flat_state(key, source, self.entry.cut.total), name, source)
        else:
            context.used |= {stored_name, source}
            self._attach_later(_key_of(key), self._create(key, source))

    def _fill(self, live: torch.Tensor, name: str, source: str) -> None:
        own = self.entry.part_of(live)
        self.context.fill(name, describe_state(own, name, self.entry.described, meta_ok=True), own, source)

    def _flat_state(self, key: str, source: str, total: int) -> torch.Tensor:
        """Missing state of a flat parameter, made once; each of its parts fills its own elements."""
        place = id(self.entry.parameter), key
        if place not in self.flats.made:
            dtype, shape = self.context.saved.tensors[source]
            made = torch.zeros((total,) if shape else (), dtype=torch_dtype(dtype), device=self._device_for(key, shape))
            counts = key == "step" and self._is_torchs() and not shape
            self.flats.made[place] = made.float() if counts else made
            self._attach_later(_key_of(key), lambda: self.flats.made[place])
        found: torch.Tensor = self.flats.made[place]
        return found

    def _plain(self, key: Any, part: Json, name: str) -> None:
        if self.entry.cut is not None and self.flats.made.setdefault((id(self.entry.parameter), key), part) != part:
            self.context.problems.append(f"{name}: differs among the parameters of one flat parameter of FSDP1")
        if key == "step" and not self.saved.native and self._is_torchs() and type(part) in (int, float):
            count = float(part)  # type: ignore[arg-type]
            self._attach_later(
                key, lambda: torch.tensor(count, dtype=torch.float32)
            )  # torch itself counted in plain numbers once
            return
        self.context.device = self.entry.described.tensor.device
        try:
            self._attach_later(key, self.match(self.live.get(key), part, name))
        finally:
            self.context.device = None

    def _attach_later(self, key: Any, build: Build) -> None:
        optimizer, parameter = self.view.optimizer, self.entry.parameter
        self.context.actions["optimizers"].append(lambda: _attach(optimizer, parameter, key, build()))

    def _create(self, key: str, source: str) -> Build:
        """Missing state: device, layout and memory format of the parameter; dtype and shape as stored."""
        context, described = self.context, self.entry.described
        dtype, shape = context.saved.tensors[source]
        if shape == ():
            return self._create_scalar(key, source, dtype)
        if shape != described.global_shape:
            tensor = context.fresh(source, described.tensor.device)
            return lambda: tensor
        parameter = self.entry.parameter
        made = context.fresh_part(source, described, parameter._spec if isinstance(parameter, DTensor) else None)
        return lambda: made

    def _is_torchs(self) -> bool:
        return type(self.view.optimizer).__module__.startswith("torch.optim")

    def _create_scalar(self, key: str, source: str, dtype: str) -> Build:
        """A counter: on the CPU unless this group counts on the device; torch's own optimizers count in floats."""
        tensor = self.context.fresh(source, self._device_for(key, ()))
        if key == "step" and self._is_torchs() and not tensor.is_floating_point():
            return lambda: tensor.to(torch.float32)
        return lambda: tensor

    def _device_for(self, key: str, shape: tuple[int, ...]) -> torch.device:
        on_device = bool(shape or key != "step" or self.group.get("capturable") or self.group.get("fused"))
        return self.entry.described.tensor.device if on_device else torch.device("cpu")


def _key_of(component: str) -> Any:
    """The state key of an escaped component."""
    (found,) = names.split(component)
    return Decoder().decode(loads(found.text)) if isinstance(found, names.TypedKey) else found


def _attach(optimizer: Optimizer, parameter: torch.Tensor, key: Any, value: Any) -> None:
    state = optimizer.state.setdefault(parameter, {})
    if state.get(key) is not value or key not in state:
        state[key] = value


def _setter(holder: dict[Any, Any], key: Any, build: Build) -> Callable[[], object]:
    def put() -> None:
        holder[key] = build()

    return put


def _remover(holder: dict[Any, Any], key: Any) -> Callable[[], object]:
    return lambda: holder.pop(key, None)


def _set_later(context: Context, holder: Any, key: Any, build: Build) -> None:
    context.actions["optimizers"].append(_setter(holder, key, build))
