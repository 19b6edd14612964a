"""Restoring a module: tensors in place, extra state and hooks as the module wants them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ckptengine.state import fsdp1
from ckptengine.state.context import Absent, Context, below, is_node
from ckptengine.state.encoding import Json
from ckptengine.state.modules import ModuleTensor, ModuleView
from ckptengine.state.sharded import Sharded
from ckptengine.state.tensors import Described, describe


def match_module(context: Context, view: ModuleView, data: Json | Absent, name: str) -> None:
    """Plan the restore of one module under ``name`` from its saved node."""
    extras: dict[str, Json] = {}
    if is_node(data, "module") and isinstance(data, dict):
        found = data.get("extra", {})
        extras = found if isinstance(found, dict) else {}
    elif not isinstance(data, Absent) and not (isinstance(data, dict) and "$" not in data):
        context.problems.append(f"{name or 'the state itself'}: a module live, a plain value in the checkpoint")
        return
    replaced: dict[str, Any] = {}
    for entry in view.tensors:
        full = below(name, entry.key)
        if context.selection.covers(full):
            _match_tensor(context, entry, full, extras, replaced)
    setters: list[Callable[[], object]] = []
    for key in view.extras:
        full = below(name, key)
        if isinstance(data, Absent) or not context.selection.covers(full):
            continue
        source = context.stored(full)
        if key not in extras and source is None:
            context.missing(full)
            continue
        value = context.fresh(source) if source is not None and key not in extras else context.decode(extras[key])
        if key in view.extra_owner and not view.loads:
            setters.append(_setter(view.extra_owner[key], value))
        else:
            replaced[view.raw_extras[key]] = value
    known = {*view.extras, *(entry.key for entry in view.tensors)}
    context.extra += [below(name, key) for key in extras if key not in known]
    context.actions["modules"] += setters
    context.actions["modules"] += [functools.partial(fsdp1.settle, handle) for handle in view.handles]
    if view.state_dict is not None and (view.loads or replaced):
        state = view.state_dict
        context.actions["modules"].append(lambda: _load(view.module, state, replaced))


def _match_tensor(
    context: Context, entry: ModuleTensor, name: str, extras: dict[str, Json], replaced: dict[str, Any]
) -> None:
    described = _described(context, entry, name)
    source = context.stored(name)
    if entry.in_place:
        source = _master_of(context, name, described, source) or source
        context.used.add(name)
        context.fill(name, described, entry.value, source)
    elif source is None and entry.key in extras:  # saved as a plain value by this module's hook
        replaced[entry.raw_key] = context.decode(extras[entry.key])
    elif source is None:
        context.missing(name)
    elif described.sharding is not None:  # made by a hook for us: its own local part is filled
        context.fill(name, described, None, source)
    else:
        context.used.add(name)
        replaced[entry.raw_key] = context.fresh(source, described.tensor.device)


def _described(context: Context, entry: ModuleTensor, name: str) -> Described:
    found = context.walk.found.get(name)
    return found.described if found is not None else describe(entry.value, name, meta_ok=True)


def _master_of(context: Context, name: str, described: Described, source: str | None) -> str | None:
    """The fp32 master copy of a live fp32 parameter, where the weights stored beside it are rounded or absent."""
    if described.dtype != "float32" or (source is not None and context.saved.tensors[source][0] == "float32"):
        return None
    names = (name, context.saved.aliases.get(name, name))  # of tied parameters one has the master
    keys = dict.fromkeys(entry.key for entry in map(context.parameter_named, names) if entry is not None)
    for optimizer, key in itertools.product(("optim", *context.walk.optimizers), keys):
        master = context.stored(f"{below(optimizer, key)}.master")
        if master is not None and context.saved.tensors[master] == ("float32", described.global_shape):
            if source is not None:
                context.used.add(source)
            return master
    return None


def _setter(module: nn.Module, value: object) -> Callable[[], object]:
    return lambda: module.set_extra_state(value)


def _load(module: nn.Module, state: dict[str, Any], replaced: dict[str, Any]) -> None:
    loaded = {key: part.tensor if isinstance(part, Sharded) else part for key, part in {**state, **replaced}.items()}
    metadata = getattr(state, "_metadata", None)
    result = _with_metadata(loaded, metadata)
    with torch.no_grad():
        if type(module).load_state_dict is not nn.Module.load_state_dict:
            module.load_state_dict(result)
            return
        told = module.load_state_dict(result, strict=False)  # what its own state_dict() leaves out may be missing
    lost = [*told.unexpected_keys, *(key for key in told.missing_keys if key in loaded)]
    if lost:
        raise RuntimeError(f"load_state_dict of {type(module).__qualname__} did not take {', '.join(lost)}")


class _StateDict(dict[str, Any]):
    """A dict that carries torch's version metadata, as the one from ``Module.state_dict`` does."""

    _metadata: object = None


def _with_metadata(state: dict[str, Any], metadata: object) -> dict[str, Any]:
    if metadata is None:
        return state
    result = _StateDict(state)
    result._metadata = metadata
    return result
