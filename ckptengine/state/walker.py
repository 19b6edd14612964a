"""`Walker`: flattening the same state again in a fraction of the time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ckptengine.state import modules, names, random
from ckptengine.state.collect import Collector, TensorLike, Walk
from ckptengine.state.collection import no_collection
from ckptengine.state.encoding import Json, items_of
from ckptengine.state.flatten import collect, freeze, leaf_of
from ckptengine.state.laid import Laid, laid_of, lies_elsewhere
from ckptengine.state.leaves import FlatState
from ckptengine.state.led import is_led
from ckptengine.state.optimizers import OptimizerView


class _Changed(Exception):
    """The state is no longer structurally what the last walk found."""


class Walker:
    """Flattens one state again and again.

    `flatten` reuses the leaves of the walk before as long as the state is structurally the same (the same tensors at
    the same addresses under the same names), and always reads plain values, extra state and objects anew.  A module
    whose ``state_dict`` is customised by post-hooks or overridden methods is walked in full every time.
    """

    def __init__(self, state: object, *, random: bool = True) -> None:
        self.state = state
        self.random = random
        self._last: _Remembered | None = None

    def flatten(self) -> FlatState:
        """As `ckptengine.state.flatten.flatten`; ``tensors`` is the same tuple as before where nothing changed."""
        with no_collection():
            if self._last is not None:
                try:
                    return self._again(self._last)
                except _Changed:
                    self._last = None
            walk = collect(self.state)
            flat = freeze(walk, random=self.random)
            self._last = _Remembered(walk, flat)
            return flat

    def _again(self, last: _Remembered) -> FlatState:
        fresh = _Recollector(last).run(self.state)
        tensors = last.flat.tensors
        if fresh.found:
            leaves = list(tensors)
            for name, found in fresh.found.items():
                leaves[last.dynamic[name]] = leaf_of(found)
            tensors = tuple(leaves)
        rank_values: dict[str, Json] = {"values": fresh.per_rank}
        if self.random:
            rank_values["random"] = random.capture()
        return FlatState(tensors, last.flat.aliases, fresh.values, rank_values, last.flat.structure_key)


Probe = tuple[dict[Any, Any], Any, TensorLike, Laid]
"""Holder, key, the tensor that hung there, and how it lay in memory."""


@dataclass(slots=True)
class _Probes:
    """What must still hold for one module or optimizer: sizes of dicts, and identity and address of tensors."""

    sizes: list[tuple[Any, int]] = field(default_factory=list)
    transient: list[tuple[nn.Module, set[str]]] = field(default_factory=list)
    parts: list[tuple[dict[str, Any], str, object]] = field(default_factory=list)
    tensors: list[Probe] = field(default_factory=list)
    pre_hooked: list[tuple[nn.Module, str]] = field(default_factory=list)
    members: list[tuple[dict[str, Any], list[int]]] = field(default_factory=list)
    plain: list[tuple[str, dict[Any, Any], int]] = field(default_factory=list)
    led: list[tuple[nn.Module, bool]] = field(default_factory=list)

    def watch(self, holder: dict[Any, Any], key: Any, tensor: torch.Tensor) -> None:
        self.tensors.append((holder, key, tensor, laid_of(tensor)))

    def check(self) -> None:
        """Raises `_Changed` where something does not hold any more."""
        for sized, size in self.sizes:
            if len(sized) != size:
                raise _Changed
        for module, names_of_buffers in self.transient:
            if module._non_persistent_buffers_set != names_of_buffers:
                raise _Changed
        for module, was in self.led:
            if is_led(module) is not was:
                raise _Changed
        for holder, key, part in self.parts:
            if holder.get(key) is not part:
                raise _Changed
        for holder, key, tensor, laid in self.tensors:
            if holder.get(key) is not tensor or lies_elsewhere(tensor, laid):
                raise _Changed
        for group, ids in self.members:
            if list(map(id, group["params"])) != ids:
                raise _Changed


class _Remembered:
    """A finished walk and what to check before it may be used again."""

    def __init__(self, walk: Walk, flat: FlatState) -> None:
        self.walk = walk
        self.flat = flat
        self.dynamic = {leaf.name: i for i, leaf in enumerate(flat.tensors) if walk.found[leaf.name].live is None}
        self.modules = {name: _module_probes(view) for name, view in walk.modules.items() if view.saves_plainly}
        self.optimizers = {name: _optimizer_probes(view) for name, view in walk.optimizers.items()}
        self.count = len(walk.in_containers) + sum(map(len, walk.tensor_dicts.values()))
        self.contained = {name: (live, laid_of(live)) for name, live in walk.in_containers.items()}
        # What is not asked for again; very many objects, which the collector would look at.
        walk.found = {name: walk.found[name] for name in self.dynamic}
        walk.parameters = {}


def _module_probes(view: modules.ModuleView) -> _Probes:
    probes = _Probes()
    for raw, _, part in modules.walk(view.module):
        if modules.pre_hooks(part):
            probes.pre_hooked.append((part, raw))
        if isinstance(part, DistributedDataParallel):
            probes.led.append((part, is_led(part)))
        dicts = (part._parameters, part._buffers, part._modules, part._state_dict_hooks, part._state_dict_pre_hooks)
        probes.sizes += [(sized, len(sized)) for sized in dicts]
        probes.transient.append((part, set(part._non_persistent_buffers_set)))
        probes.parts += [(part._modules, name, child) for name, child in part._modules.items()]
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if isinstance(tensor, torch.Tensor):
                    probes.watch(holder, key, tensor)
                else:
                    probes.parts.append((holder, key, None))
    return probes


def _optimizer_probes(view: OptimizerView) -> _Probes:
    probes = _Probes()
    probes.sizes = [(view.optimizer.param_groups, len(view.groups)), (view.optimizer.state, len(view.optimizer.state))]
    probes.members = [(group.live, list(map(id, group.live["params"]))) for group in view.groups]
    for key, entry in view.entries.items():
        parts = view.optimizer.state.get(entry.parameter)
        if not isinstance(parts, dict):
            continue
        probes.sizes.append((parts, len(parts)))
        probes.parts.append((view.optimizer.state, entry.parameter, parts))  # type: ignore[arg-type]
        plain = sum(not isinstance(part, torch.Tensor) for part in parts.values())
        if plain:
            probes.plain.append((key, parts, plain))
        for state_key, part in parts.items():
            if isinstance(part, torch.Tensor):
                probes.watch(parts, state_key, part)
    return probes


class _Recollector(Collector):
    """A walk that confirms known tensors instead of describing them; what it records is only what is made anew."""

    def __init__(self, last: _Remembered) -> None:
        super().__init__()
        self._last = last
        self._confirmed = 0
        self._visited = 0

    def run(self, state: object) -> Walk:
        walk = super().run(state)
        last = self._last
        if self._confirmed != last.count or self._visited != len(last.modules) + len(last.optimizers):
            raise _Changed
        if walk.found.keys() != last.dynamic.keys() or walk.per_rank.keys() != last.walk.per_rank.keys():
            raise _Changed
        for name, found in walk.found.items():
            known = last.walk.found[name].described
            if (found.described.dtype, found.described.global_shape) != (known.dtype, known.global_shape):
                raise _Changed
        return walk

    def _entries(self, value: dict[Any, Any], name: str) -> Json:
        known = self._last.walk.tensor_dicts.get(name) if self._confirmable() else None
        if known is None:
            return items_of(self.encoder, value, name)
        if not known.is_same(value):
            raise _Changed
        self._confirmed += len(known)
        return known.items

    def _leaf(self, value: object, name: str) -> Any:
        known = self._last.contained.get(name)
        if known is not None and known[0] is value and not self._in_object and self._rank is None:
            if lies_elsewhere(known[0], known[1]):
                raise _Changed
            self._confirmed += 1
            return {"$": "tensor", "name": name}
        return super()._leaf(value, name)

    def _tensor(self, value: TensorLike, name: str, *, in_container: bool = True) -> str:
        if self._in_object:
            return super()._tensor(value, name)
        if self._rank is not None:
            name = names.join(name, names.escape(names.RankMark(self._rank)))
        known = self._last.contained.get(name)
        if known is None or known[0] is not value or lies_elsewhere(value, known[1]):
            raise _Changed
        self._confirmed += 1
        return name

    def _module(self, module: nn.Module, name: str) -> Json:
        view, probes = self._last.walk.modules.get(name), self._last.modules.get(name)
        if view is None or probes is None or view.module is not module:
            raise _Changed
        for part, raw in probes.pre_hooked:
            for hook in modules.pre_hooks(part):
                hook(part, raw, False)
        probes.check()
        self._visited += 1
        node: dict[str, Json] = {"$": "module"}
        if view.extras:
            prefix = f"{name}." if name else ""
            with self._object_scope():
                node["extra"] = {
                    key: self.encoder.encode(owner.get_extra_state(), prefix + key)
                    for key, owner in view.extra_owner.items()
                }
        return node

    def _optimizer(self, optimizer: Optimizer, name: str, node: dict[str, Json]) -> None:
        view, probes = self._last.walk.optimizers.get(name), self._last.optimizers.get(name)
        if view is None or probes is None or view.optimizer is not optimizer:
            raise _Changed
        probes.check()
        if any(live is not group.live for live, group in zip(optimizer.param_groups, view.groups, strict=True)):
            raise _Changed
        self._visited += 1
        node["groups"] = self._groups(view)
        state: dict[str, Json] = {}
        for key, parts, count in probes.plain:
            self._parameter = view.entries[key].described
            try:
                plain = {k: part for k, part in parts.items() if not isinstance(part, torch.Tensor)}
                if len(plain) != count:  # a tensor where there was none
                    raise _Changed
                state[key] = self.encoder.encode(plain, names.join(name, key))
            finally:
                self._parameter = None
        node["state"] = state
        items: Any = optimizer.state.items()
        shared = {key: parts for key, parts in items if not isinstance(key, torch.Tensor)}
        if shared:
            node["shared"] = self._shared(shared, name)

    def _own_by_storage(self) -> None:
        """Owners are those of the walk before."""
