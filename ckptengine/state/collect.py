"""One walk over a nested live state: every tensor by name, and the encoding of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.optim import Optimizer

from ckptengine.errors import CheckpointError, UnsupportedValue
from ckptengine.state import modules, names, objects, optimizers
from ckptengine.state.encoding import Encoder, Json, items_of, where
from ckptengine.state.laid import PLAIN_TYPES
from ckptengine.state.leaves import Role
from ckptengine.state.optimizers import ParameterEntry
from ckptengine.state.scalars import array_dtype
from ckptengine.state.sharded import PerRank, Sharded
from ckptengine.state.tensor_dicts import TensorDict, is_tensor_dict
from ckptengine.state.tensors import Described, converted, describe, describe_plain, global_rank

TensorLike = torch.Tensor | Sharded
_TENSORS = (torch.Tensor, Sharded)  # a tuple: a union would be made anew for each of very many tensors


@dataclass(slots=True)
class Found:
    """A tensor of the state while it is being walked.  ``live`` is what restoring fills; None for a copy."""

    name: str
    described: Described
    live: TensorLike | None
    role: Role
    eager: bool
    owners: tuple[int, ...] = ()
    follows: bool = False


@dataclass(slots=True)
class Walk:
    """Everything that one walk over a state found; `FlatState` and restoring are both made from it."""

    found: dict[str, Found] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    modules: dict[str, modules.ModuleView] = field(default_factory=dict)
    optimizers: dict[str, optimizers.OptimizerView] = field(default_factory=dict)
    optimizer_at: dict[int, str] = field(default_factory=dict)
    parameters: dict[int, list[ParameterEntry]] = field(default_factory=dict)
    types: dict[str, type] = field(default_factory=dict)
    values: Json = None
    per_rank: dict[str, Json] = field(default_factory=dict)
    keep: list[object] = field(default_factory=list)
    in_containers: dict[str, TensorLike] = field(default_factory=dict)
    tensor_dicts: dict[str, TensorDict] = field(default_factory=dict)
    on_meta: list[str] = field(default_factory=list)
    specs: dict[str, DTensorSpec] = field(default_factory=dict)  # of the DTensors in objects' states


class Collector:
    """Walks a state once.  ``meta_ok``: list tensors on meta in `Walk.on_meta` rather than refuse them."""

    def __init__(self, *, meta_ok: bool = False) -> None:
        self._meta_ok = meta_ok
        self.walk = Walk()
        self.encoder = Encoder(self._leaf)
        self.encoder.mapping = self._entries
        self._rank: int | None = None
        self._in_object = 0
        self._parameter: Described | None = None
        self._owned: tuple[int, ...] = ()
        self._eager = False
        self._pending: list[tuple[Optimizer, str, dict[str, Json]]] = []
        self._first: dict[object, Found] = {}
        self._tied: dict[tuple[Any, ...], Found] = {}
        self._bare: dict[int, tuple[torch.Tensor, str, Described]] = {}

    def run(self, state: object) -> Walk:
        walk = self.walk
        try:
            walk.values = self.encoder.encode(state)
            for optimizer, name, node in self._pending:  # after all modules, whose names they use
                self._optimizer(optimizer, name, node)
        finally:
            # They refer to us: a walk of very many tensors must not be cyclic garbage.
            self.encoder.leaf = self.encoder.mapping = None
        self._own_by_storage()
        walk.types = self.encoder.types
        return walk

    def _entries(self, value: dict[Any, Any], name: str) -> Json:
        """Encode the entries of a mapping, and remember it where a later walk can confirm it as a whole."""
        if not (self._confirmable() and is_tensor_dict(value)):
            return items_of(self.encoder, value, name)
        contained = self.walk.in_containers
        self.walk.in_containers = {}
        items = items_of(self.encoder, value, name, self._entry)
        self.walk.in_containers = contained
        self.walk.tensor_dicts[name] = TensorDict(value, items)
        return items

    def _entry(self, value: Any, name: str) -> Any:
        """A tensor of a dict of nothing else."""
        return {"$": "tensor", "name": self._tensor(value, name)}

    def _confirmable(self) -> bool:
        """Whether tensors here are those of the state itself: not an object's, one rank's, or an optimizer's."""
        return not self._in_object and self._rank is None and self._parameter is None

    def _leaf(self, value: object, name: str) -> Any:
        if isinstance(value, _TENSORS):
            return self._entry(value, name)
        if isinstance(value, nn.Module):
            return self._module(value, name)
        if isinstance(value, Optimizer):
            if name in self.walk.optimizers:
                raise UnsupportedValue(f"{where(name)}: two optimizers have this name")
            node: dict[str, Json] = {"$": "optimizer", "type": objects.class_name(value)}
            self._pending.append((value, name, node))
            return node
        if isinstance(value, PerRank):
            return self._per_rank(value, name)
        if isinstance(value, np.ndarray):
            return self._array(value, name)
        stateful = objects.as_stateful(value)
        return NotImplemented if stateful is None else self._object(stateful, name)

    def _tensor(self, value: TensorLike, name: str, *, in_container: bool = True) -> str:
        parameter = self._parameter
        if (
            isinstance(value, torch.Tensor)
            and not self._in_object
            and (parameter is None or parameter.sharding is None)
        ):
            role: Role = "optimizer" if parameter is not None else _role_of(value)
            described = self._quick(name, value, role, parameter is None and self._eager)
            if described is not None:
                if in_container:
                    self.walk.in_containers[name] = value
                if parameter is None:
                    self._bare.setdefault(id(value), (value, name, described))
                return name
        if parameter is not None and isinstance(value, torch.Tensor):
            described = optimizers.describe_state(value, name, parameter, meta_ok=self._meta_ok)
            return self._add(name, described, value, "optimizer", False, in_container=in_container)
        described = describe(value, name, meta_ok=self._meta_ok)
        if self._in_object:
            if isinstance(value, DTensor):
                self.walk.specs[name] = value._spec
            return self._add(name, described, None, "other", True)
        tensor = _tensor_of(value)
        stored = self._add(name, described, value, _role_of(tensor), self._eager, in_container=True)
        self._bare.setdefault(id(tensor), (tensor, name, described))
        return stored

    def _quick(self, name: str, value: TensorLike, role: Role, eager: bool) -> Described | None:
        """Record a whole tensor with memory of its own as `describe` and `_add` would, in a third of the time; None for
        anything but this most frequent kind, of which nothing is recorded."""
        if isinstance(value, Sharded) or type(value) not in PLAIN_TYPES or self._rank is not None:
            return None
        described = describe_plain(value)
        walk = self.walk
        if described is None or name in walk.found or name in walk.aliases:
            return None
        tensor, shape = described.tensor, described.global_shape
        found = Found(name, described, value, role, eager or (not shape and tensor.is_cpu), self._owned)
        if self._first.setdefault(tensor.data_ptr(), found) is not found:
            return None
        walk.found[name] = found
        return described

    def _add(
        self,
        name: str,
        described: Described,
        live: TensorLike | None,
        role: Role,
        eager: bool,
        *,
        in_container: bool = False,
        follows: bool = False,
    ) -> str:
        """Record a tensor; the name it is stored under."""
        if self._rank is not None:
            name = names.join(name, names.escape(names.RankMark(self._rank)))
        walk, tensor = self.walk, described.tensor
        if name in walk.found or name in walk.aliases:
            raise UnsupportedValue(f"{where(name)}: two tensors of the state have this name; rename one of the keys")
        eager = eager or (not described.global_shape and tensor.is_cpu)
        found = Found(name, described, live, role, eager, self._owned, follows)
        if in_container and live is not None:
            walk.in_containers[name] = live
        if tensor.is_meta:
            walk.on_meta.append(name)
        elif live is not None and 0 not in described.global_shape:
            # An empty shard has no memory by which to know it, but tied tensors are one object.
            filled = described.sharding is None or tensor.numel()
            owner = self._owner(tensor.data_ptr() if filled else -id(_tensor_of(live)), found)
            if owner is not found and owner.described.pieces == described.pieces:
                owner.eager = owner.eager or eager
                owner.follows = owner.follows or follows
                if owner.owners:  # what nobody owns waits for every update
                    owner.owners = _union(owner.owners, self._owned)
                if role == "parameter":
                    owner.role = role
                walk.aliases[name] = owner.name
                walk.keep.append(tensor)
                return name
        walk.found[name] = found
        return name

    def _owner(self, place: object, found: Found) -> Found:
        """The first tensor that lay as ``found`` does at its place, which may be itself; few places have several."""
        place = place if self._rank is None else (place, self._rank)
        first = self._first.setdefault(place, found)
        if first is found:
            return found
        for one in (first, found):
            lies = one.described.tensor
            key = (place, lies.shape, lies.stride(), lies.dtype, one.described.global_shape)
            owner = self._tied.setdefault(key, one)
        return owner

    def _module(self, module: nn.Module, name: str) -> Json:
        try:
            view = modules.view(module)
        except UnsupportedValue as error:
            raise UnsupportedValue(f"{where(name)}: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:
            raise UnsupportedValue(f"{where(name)}: state_dict() of this module failed: {error!r}") from error
        self.walk.modules[name] = view
        prefix = f"{name}." if name else ""
        by_id: dict[int, Described] = {}
        for entry in view.tensors:
            follows, eager = id(entry.value) in view.led, entry.role != "parameter"
            ordinary = entry.stored is None and entry.in_place and not follows
            described = self._quick(prefix + entry.key, entry.value, entry.role, eager) if ordinary else None
            if described is None:
                described = describe(entry.value, prefix + entry.key, meta_ok=self._meta_ok)
                described = described if entry.stored is None else converted(described, entry.stored)
                live = entry.value if entry.in_place else None
                self._add(prefix + entry.key, described, live, entry.role, eager, follows=follows)
            by_id[id(_tensor_of(entry.value))] = described
        for one in view.live:
            known = by_id.get(id(_tensor_of(one.value)))
            known = known or describe(one.value, prefix + one.key, meta_ok=self._meta_ok)
            item = ParameterEntry(one.parameter, prefix + one.key, name, one.key, known, one.cut, one.here)
            entries = self.walk.parameters.setdefault(id(one.parameter), [])
            if one.cut is not None or not entries:
                entries.append(item)
        node: dict[str, Json] = {"$": "module"}
        if view.extras:
            with self._object_scope():
                node["extra"] = {key: self.encoder.encode(part, prefix + key) for key, part in view.extras.items()}
        return node

    def _optimizer(self, optimizer: Optimizer, name: str, node: dict[str, Json]) -> None:
        for member in (id(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            if member not in self.walk.parameters and member in self._bare:
                self.walk.parameters[member] = [optimizers.bare_entry(*self._bare[member])]
        optimizers.check_custom(optimizer, name, {id(one) for one, _, _ in self._pending})
        view = optimizers.view(optimizer, name, self.walk.parameters)
        self.walk.optimizers[name] = view
        self.walk.optimizer_at[id(optimizer)] = name
        self._owned = view.ids
        node["groups"] = self._groups(view)
        keys: dict[int, list[str]] = {}
        for key, entry in view.entries.items():
            keys.setdefault(id(entry.parameter), []).append(key)
        state: dict[str, Json] = {}
        shared: dict[object, object] = {}
        for parameter, parts in optimizer.state.items():
            named = keys.get(id(parameter), [])
            if not named and (parts or not isinstance(parameter, torch.Tensor)):
                shared[parameter] = parts
            for key in named if isinstance(parts, dict) else ():
                plain = self._state_of(view.entries[key], names.join(name, key), parts)
                if plain:
                    state[key] = plain
        node["state"] = state
        if shared:
            node["shared"] = self._shared(shared, name)
        for entry in view.entries.values():
            stored = self.walk.found.get(self.walk.aliases.get(entry.name, entry.name))
            if stored is not None:
                stored.owners = _union(stored.owners, view.ids)
        self._owned = ()

    def _groups(self, view: optimizers.OptimizerView) -> list[Json]:
        groups: list[Json] = []
        self._eager = True  # schedulers change hyper-parameters at any time
        for index, group in enumerate(view.groups):
            prefix = names.join(view.name, f"param_groups.{index}")
            values = {key: part for key, part in group.live.items() if key not in optimizers.NOT_VALUES}
            groups.append({"params": list(group.params), "values": self.encoder.encode(values, prefix)})
        self._eager = False
        return groups

    def _state_of(self, entry: ParameterEntry, prefix: str, parts: dict[Any, Any]) -> Json:
        """Record the state tensors of one parameter; the encoding of the rest."""
        self._parameter = entry.described
        try:
            plain: dict[Any, Any] = {}
            for key, part in parts.items():
                if isinstance(part, torch.Tensor):
                    component = self.encoder.key_component(key, prefix)
                    self._tensor(entry.part_of(part), names.join(prefix, component), in_container=False)
                else:
                    plain[key] = part
            return self.encoder.encode(plain, prefix) if plain else None
        finally:
            self._parameter = None

    def _shared(self, shared: dict[object, object], name: str) -> Json:
        for key in shared:
            if isinstance(key, torch.Tensor):
                raise UnsupportedValue(
                    f"{where(name)} keeps state for a tensor of shape {tuple(key.shape)} that is in none of its "
                    f"groups; delete that entry of optimizer.state, or add the parameter to a group"
                )
        return self.encoder.encode(shared, names.join(name, "state"))

    def _object(self, value: objects.Stateful, name: str) -> Json:
        try:
            state = value.state_dict()
        except CheckpointError:
            raise
        except Exception as error:
            raise UnsupportedValue(f"{where(name)}: its state_dict() failed: {error!r}") from error
        with self._object_scope():
            return {"$": "object", "type": objects.class_name(value), "state": self.encoder.encode(state, name)}

    @contextmanager
    def _object_scope(self) -> Iterator[None]:
        self._in_object += 1
        try:
            yield
        finally:
            self._in_object -= 1

    def _per_rank(self, value: PerRank, name: str) -> Json:
        if self._rank is not None:
            raise UnsupportedValue(f"{where(name)}: a PerRank inside a PerRank; the outer one already says it")
        self._rank = global_rank()
        pending, self._pending = self._pending, []
        try:
            self.walk.per_rank[name] = self.encoder.encode(value.value, name)
            if self._pending:
                raise UnsupportedValue(f"{where(name)}: an optimizer cannot be PerRank; its parameters have layouts")
        finally:
            self._rank, self._pending = None, pending
        return {"$": "per_rank"}

    def _array(self, value: np.ndarray[Any, Any], name: str) -> Json:
        dtype = array_dtype(value, name)
        usable = value.flags.c_contiguous and value.flags.writeable
        array = value if usable else np.array(value, order="C")
        native = array.dtype.isnative and array.dtype.kind in "biufc" and array.dtype.itemsize <= 16
        try:
            tensor = torch.from_numpy(array if native else array.reshape(-1).view(np.uint8))
        except TypeError:  # a numeric dtype that torch lacks (long double)
            tensor = torch.from_numpy(array.reshape(-1).view(np.uint8))
        stored = self._add(name, describe(tensor, name), None, "other", True)
        self.walk.keep.append(array)
        return {"$": "ndarray", "dtype": dtype, "shape": list(value.shape), "tensor": stored}

    def _own_by_storage(self) -> None:
        """Give leaves that share memory with an optimizer's parameters that optimizer as an owner."""
        owners: dict[int, tuple[int, ...]] = {}
        for view in self.walk.optimizers.values():
            for entry in view.entries.values():
                pointer = entry.described.tensor.untyped_storage().data_ptr()
                owners[pointer] = _union(owners.get(pointer, ()), view.ids)
        if not owners:
            return
        for found in self.walk.found.values():
            if not found.owners and found.described.tensor.numel():
                if found.role == "optimizer":
                    continue
                found.owners = owners.get(found.described.tensor.untyped_storage().data_ptr(), ())


def _role_of(value: object) -> Role:
    plain = type(value) is torch.Tensor and not getattr(value, "_is_param", False)
    return "other" if plain or not isinstance(value, nn.Parameter) else "parameter"


def _tensor_of(value: TensorLike) -> torch.Tensor:
    return value.tensor if isinstance(value, Sharded) else value


def _union(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return first if set(second) <= set(first) else (*first, *(one for one in second if one not in first))
