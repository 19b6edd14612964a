"""The tensors and values of a module, by canonical name, with the semantics of ``state_dict()``.

A module tree without custom hooks is read straight from its parameters and buffers, which gives the live objects.
State-dict pre-hooks are called as torch calls them (FSDP2 reshards in one).  A tree with post-hooks or overridden
methods is asked for its ``state_dict()``; entries that alias live parameters are still filled in place, others go
through ``load_state_dict``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ckptengine.errors import UnsupportedValue
from ckptengine.state import fsdp1, names
from ckptengine.state.laid import local_of
from ckptengine.state.leaves import Role
from ckptengine.state.led import led_buffers
from ckptengine.state.sharded import Sharded

_WRAPPERS: dict[tuple[str, str], str] = {
    ("torch.nn.parallel", "DistributedDataParallel"): "module",
    ("torch.nn.parallel", "DataParallel"): "module",
    fsdp1.CLASS: "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("torch._dynamo", "OptimizedModule"): "_orig_mod",
}
"""Classes (package prefix and name) that are transparent: the attribute that holds the wrapped module."""

_BENIGN_HOOKS = ("torch.distributed.fsdp._fully_shard", "torch.distributed.algorithms._checkpoint", fsdp1.HOOKS)
"""Packages whose state-dict hooks only rename wrapper prefixes, reshard or gather shards; none of it is needed here."""

_wrapper_of_type: dict[type, str | None] = {}
_saves_plainly: dict[type, bool] = {}
_loads_plainly: dict[type, bool] = {}


class ModuleTensor(NamedTuple):
    """One entry: ``value`` is the live parameter or buffer itself, or a tensor that a hook made (not ``in_place``).

    ``stored`` is the dtype under which it is kept, where that is not its own.
    """

    key: str
    raw_key: str
    value: torch.Tensor | Sharded
    role: Role
    in_place: bool
    stored: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a live tensor hangs: ``holder[key] is tensor`` as long as nothing replaced it."""

    holder: dict[str, Any]
    key: str


class Hanging(NamedTuple):
    """A parameter where it hangs in a module: ``value`` is its live memory, the rest as in `fsdp1.FlatPart`."""

    raw_key: str
    key: str
    value: torch.Tensor | Sharded
    parameter: nn.Parameter
    cut: fsdp1.Cut | None = None
    here: bool = True


@dataclass(slots=True)
class ModuleView:
    """A module as entries.

    ``extras`` are the entries that are no tensors, by canonical key; ``extra_owner`` says which sub-module's
    ``set_extra_state`` takes one back.  ``loads``: restoring must call ``load_state_dict`` (with ``state_dict``).
    ``live`` are its parameters, each under the first of its names.  ``handles``: FSDP1's.  ``led``: `led_buffers`.
    """

    module: nn.Module
    tensors: list[ModuleTensor] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)
    raw_extras: dict[str, str] = field(default_factory=dict)
    extra_owner: dict[str, nn.Module] = field(default_factory=dict)
    live: list[Hanging] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    led: frozenset[int] = frozenset()
    state_dict: dict[str, Any] | None = None
    loads: bool = False
    saves_plainly: bool = True


def wrapped_attribute(module: nn.Module) -> str | None:
    """The name of the attribute that ``module`` is only a wrapper around; None for a module of its own."""
    kind = type(module)
    if kind not in _wrapper_of_type:
        _wrapper_of_type[kind] = next(
            (
                attribute
                for base in kind.__mro__
                for (package, name), attribute in _WRAPPERS.items()
                if base.__name__ == name and base.__module__.startswith(package)
            ),
            None,
        )
    attribute = _wrapper_of_type[kind]
    return attribute if attribute is not None and attribute in module._modules else None


def walk(module: nn.Module, raw: str = "", canonical: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(raw prefix, canonical prefix, sub-module) in the order of ``state_dict()``; prefixes end in a dot or are empty.

    A shared sub-module comes once per path.
    """
    yield raw, canonical, module
    transparent = wrapped_attribute(module)
    for name, child in module._modules.items():
        if child is not None:
            part = "" if name == transparent else f"{names.escape(name)}."
            yield from walk(child, f"{raw}{name}.", canonical + part)


def view(module: nn.Module) -> ModuleView:
    """Everything that ``module.state_dict()`` has, as live objects where they can be."""
    tree = list(walk(module))
    for raw, _, part in tree:
        for hook in pre_hooks(part):
            hook(part, raw, False)
    parts = [part for _, _, part in tree]
    found = ModuleView(module, handles=fsdp1.handles_of(parts), led=led_buffers(parts))
    found.loads = not all(_part_loads_plainly(part) for _, _, part in tree)
    found.saves_plainly = all(_part_saves_plainly(part) for _, _, part in tree)
    if found.handles and (found.loads or not found.saves_plainly):
        odd = next(part for _, _, part in tree if not (_part_loads_plainly(part) and _part_saves_plainly(part)))
        raise UnsupportedValue(
            f"FSDP1 wraps a {type(odd).__qualname__}, which has a state_dict of its own or hooks on it; shard with "
            f"torch.distributed.fsdp.fully_shard"
        )
    hanging = _hanging(tree, found.handles)
    first: dict[int, Hanging] = {}
    for one in itertools.chain.from_iterable(hanging):
        first.setdefault(id(one.value), one)
    found.live = list(first.values())
    if found.saves_plainly:
        _view_plainly(found, tree, hanging)
        if found.loads:
            found.state_dict = module.state_dict()
    else:
        _view_state_dict(found, tree)
    return found


def pre_hooks(part: nn.Module) -> list[Any]:
    """What ``state_dict()`` calls first, FSDP1's aside."""
    hooks = part._state_dict_pre_hooks
    return [hook for hook in hooks.values() if not _is_of(hook, (fsdp1.HOOKS,))] if hooks else []


def _hanging(tree: list[tuple[str, str, nn.Module]], handles: list[Any]) -> list[list[Hanging]]:
    """The parameters of each module of ``tree``, those behind flat ones first."""
    flattened = fsdp1.flat_parts(handles)
    flat = {id(handle.flat_param) for handle in handles}
    found: list[list[Hanging]] = []
    for raw, canonical, part in tree:
        behind = flattened.get(id(part), {})
        found.append(
            [Hanging(raw + name, canonical + names.escape(name), *one) for name, one in behind.items()]
            + [
                Hanging(raw + name, canonical + names.escape(name), parameter, parameter)
                for name, parameter in part._parameters.items()
                if parameter is not None and name not in behind and id(parameter) not in flat
            ]
        )
    return found


def _view_plainly(found: ModuleView, tree: list[tuple[str, str, nn.Module]], hanging: list[list[Hanging]]) -> None:
    lowered = _lowered(tree) if found.handles else {}
    for (raw, canonical, part), parameters in zip(tree, hanging, strict=True):
        found.tensors += [ModuleTensor(one.key, one.raw_key, one.value, "parameter", True) for one in parameters]
        transient = part._non_persistent_buffers_set
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in transient:
                key = canonical + names.escape(name)
                low, before = lowered.get(key, (None, None))
                stored = before if buffer.dtype == low else None
                found.tensors.append(ModuleTensor(key, raw + name, buffer, "buffer", True, stored))
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            found.extras[f"{canonical}_extra_state"] = part.get_extra_state()
            found.raw_extras[f"{canonical}_extra_state"] = f"{raw}_extra_state"
            found.extra_owner[f"{canonical}_extra_state"] = part
    if any(entry.stored is not None for entry in found.tensors):
        found.saves_plainly = False  # copies, to be made anew by every walk


def _lowered(tree: list[tuple[str, str, nn.Module]]) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Buffers that FSDP1 keeps in a lower precision: that one, and the one they had.  Inner wrappers have the say."""
    return {
        canonical + ".".join(map(names.escape, name.split("."))): (low, before)
        for _, canonical, part in tree
        for name, low, before in fsdp1.lowered_buffers(part)
    }


def _view_state_dict(found: ModuleView, tree: list[tuple[str, str, nn.Module]]) -> None:
    state = found.module.state_dict()
    found.state_dict = state
    live: dict[tuple[Any, ...], tuple[torch.Tensor, Role]] = {}
    for raw, _, part in tree:
        holders: list[tuple[Role, Mapping[str, torch.Tensor | None]]]
        holders = [("parameter", part._parameters), ("buffer", part._buffers)]
        for role, holder in holders:
            for name, tensor in holder.items():
                if tensor is not None:
                    live.setdefault(_identity(tensor), (tensor, role))
                    live.setdefault((raw + name, *_identity(tensor)), (tensor, role))
    prefixes: dict[str, str] = {}
    for raw_key, value in state.items():
        head, _, tail = raw_key.rpartition(".")
        if head not in prefixes:
            prefixes[head] = canonical_prefix(found.module, head)
        key = prefixes[head] + names.escape(tail)
        if isinstance(value, Sharded):
            same = live.get(_identity(value.tensor))
            kind: Role = same[1] if same else "other"
            found.tensors.append(ModuleTensor(key, raw_key, value, kind, same is not None))
        elif isinstance(value, torch.Tensor):
            identity = _identity(value)
            same = live.get((raw_key, *identity)) or live.get(identity)
            if same is not None:
                found.tensors.append(ModuleTensor(key, raw_key, same[0], same[1], True))
            else:
                found.loads = True
                found.tensors.append(ModuleTensor(key, raw_key, value, "other", False))
        else:
            found.extras[key] = value
            found.raw_extras[key] = raw_key


def canonical_prefix(module: nn.Module, raw: str) -> str:
    """The canonical prefix (empty, or ending in a dot) of a dotted path below ``module``, wrappers left out.

    A key whose wrapper prefix a hook removed already comes out the same.
    """
    parts: list[str] = []
    node: nn.Module | None = module
    for name in raw.split(".") if raw else []:
        while node is not None and (transparent := wrapped_attribute(node)) is not None:
            node = node._modules[transparent]
            if name == transparent:
                break
        else:
            parts.append(names.escape(name))
            node = node._modules.get(name) if node is not None else None
    return "".join(f"{part}." for part in parts)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two aliases of the same elements have in common."""
    local = local_of(tensor)
    if local.is_meta or local.layout is not torch.strided:
        return (id(tensor),)
    if local.numel() == 0:
        return "empty", local.dtype, tuple(local.shape)
    return local.data_ptr(), local.dtype, tuple(local.shape), tuple(local.stride())


def _is_of(hook: Any, packages: tuple[str, ...]) -> bool:
    """Whether a hook comes from one of ``packages``."""
    function = getattr(hook, "hook", hook)  # torch wraps load pre-hooks in an object with this attribute
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).startswith(packages)


def _part_saves_plainly(part: nn.Module) -> bool:
    kind = type(part)
    plainly = _saves_plainly.get(kind)
    if plainly is None:
        own_state_dict = kind.state_dict is not nn.Module.state_dict
        plainly = not own_state_dict and kind._save_to_state_dict is nn.Module._save_to_state_dict
        _saves_plainly[kind] = plainly
    return plainly and all(_is_of(hook, _BENIGN_HOOKS) for hook in part._state_dict_hooks.values())


def _part_loads_plainly(part: nn.Module) -> bool:
    kind = type(part)
    plainly = _loads_plainly.get(kind)
    if plainly is None:
        own = kind._load_from_state_dict
        # torch's own layers only translate keys of older versions there
        plainly = own.__module__.startswith("torch.nn.") and kind.load_state_dict is nn.Module.load_state_dict
        _loads_plainly[kind] = plainly
    hooks = (*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values())
    return plainly and all(_is_of(hook, _BENIGN_HOOKS) for hook in hooks)
