"""Optimizers without ZeRO, whose states lie in the model file by the parameters' positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.deepspeed.groups import MASTER
from ckptengine.sources.deepspeed.header import ModelStates, int_list
from ckptengine.sources.files import InlineFiles
from ckptengine.sources.held import Held, Whole, number
from ckptengine.sources.port import Files
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.torchrecords import cast

NAMELESS, STEP = "state", "step"
Entries = list[tuple[str, str, Held]]


Pool = Sequence[tuple[str, StoredTensor]]


@dataclass(frozen=True, slots=True)
class Pools:
    """The parameters that an optimizer's positions may mean, in the module's order.

    ``listed`` has names by group where the file says them; ``experts`` are those of groups marked as experts'.
    """

    dense: Pool
    experts: Pool = ()
    listed: Sequence[Sequence[str]] = ()


def pools_of(model: ModelStates, experts: Pool = ()) -> Pools:
    """The module's parameters, each once though it may have several names."""
    seen: set[tuple[object, ...]] = set()
    dense: list[tuple[str, StoredTensor]] = []
    for name, tensor in model.module.items():
        if name not in model.buffers and tensor.identity not in seen:
            seen.add(tensor.identity)
            dense.append((name, tensor))
    return Pools(dense, experts, [list(group) for group in model.shapes or ()])


def plain_optimizer(
    outer: Mapping[Any, Any], pools: Pools, inline: InlineFiles, first: int = 0
) -> tuple[Entries, list[dict[Any, Any]]]:
    """(parameter, state, what is held) and the parameter groups with names.

    Positions become names where shapes or values leave only one way to map them; elsewhere a parameter is called
    ``state.<position>``, counted from ``first`` on.
    """
    groups, by_position = groups_and_states(outer)
    masters = _masters(outer, groups)
    names = _names(pools, groups, by_position, masters, inline)

    def name_of(position: Any) -> str:
        return names.get(position) or (f"{NAMELESS}.{first + position}" if type(position) is int else str(position))

    found: list[tuple[str, str, Held]] = []
    for position, tensor in masters.items():
        found.append((name_of(position), MASTER, Whole(tensor)))
    steps = {at: group.get(STEP) for group in groups for at in int_list(group.get("params")) or []}
    for position, state in by_position.items():
        if isinstance(state, dict):
            found += _entries(name_of(position), {STEP: steps.get(position), **state}, inline)
    return found, [{**group, "params": [name_of(at) for at in group.get("params") or []]} for group in groups]


def positions_in(outer: Mapping[Any, Any]) -> int:
    """How many parameters an optimizer has."""
    return sum(len(group.get("params") or []) for group in groups_and_states(outer)[0])


def groups_and_states(outer: Mapping[Any, Any]) -> tuple[list[dict[Any, Any]], dict[Any, Any]]:
    """The parameter groups of the optimizer inside, and its states by position."""
    inner = outer.get("optimizer_state_dict", outer)
    if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
        return [], {}
    states = inner.get("state")
    groups = [group for group in inner["param_groups"] if isinstance(group, dict)]
    return groups, states if isinstance(states, dict) else {}


def plain_rest(model: ModelStates) -> dict[Any, Any]:
    """What the optimizer keeps beside states and groups, such as the loss scale."""
    outer = model.optimizer or {}
    found: dict[Any, Any] = {"fused": True} if "fp32_groups_flat" in outer else {}
    return found | {key: value for key, value in outer.items() if key not in _TENSORS}


_TENSORS = {"optimizer_state_dict", "fp32_groups", "fp32_groups_flat", "state", "param_groups"}


def _entries(name: str, state: Mapping[Any, Any], inline: InlineFiles) -> Iterator[tuple[str, str, Held]]:
    for key, value in state.items():
        if isinstance(value, StoredTensor):
            yield name, str(key), Whole(value)
        elif key == STEP and (held := number(value, inline)) is not None:
            yield name, STEP, held


def _masters(outer: Mapping[Any, Any], groups: Sequence[Mapping[Any, Any]]) -> dict[int, StoredTensor]:
    """fp32 copies by position, where they are kept as tensors of the parameters' shapes."""
    held = outer.get("fp32_groups")
    found: dict[int, StoredTensor] = {}
    if isinstance(held, list) and len(held) == len(groups):
        for tensors, group in zip(held, groups, strict=True):
            positions = int_list(group.get("params")) or []
            if isinstance(tensors, list) and len(tensors) == len(positions):
                pairs = zip(positions, tensors, strict=True)
                found |= {position: tensor for position, tensor in pairs if isinstance(tensor, StoredTensor)}
    return found


def _names(
    pools: Pools,
    groups: Sequence[Mapping[Any, Any]],
    states: Mapping[Any, Any],
    masters: Mapping[int, StoredTensor],
    files: Files,
) -> dict[int, str]:
    """Position -> name: as the file lists them (which ours do), by the shapes, or by the values of the fp32 copies."""
    positions = [int_list(group.get("params")) or [] for group in groups]
    if pools.listed and [len(names) for names in pools.listed] == [len(group) for group in positions]:
        return dict(zip(itertools.chain(*positions), itertools.chain(*pools.listed), strict=True))
    names: dict[int, str] = {}
    for pool, expert in ((pools.dense, False), (pools.experts, True)):
        pairs = zip(groups, positions, strict=True)
        mine = [held for group, held in pairs if (group.get("moe") is True and bool(pools.experts)) == expert]
        shapes = {at: _shape(states.get(at), masters.get(at)) for group in mine for at in group}
        copies = {at: tensor for at, tensor in masters.items() if at in shapes}
        fitting = _by_shape(pool, mine, shapes)
        if not _rounds_to(pool, fitting, copies, files):
            fitting = {}  # the optimizer was built in another order than the module's
        names |= fitting or _by_value(pool, copies, len(shapes), files)
    return names


def _rounds_to(trained: Pool, names: Mapping[int, str], masters: Mapping[int, StoredTensor], files: Files) -> bool:
    """Whether every fp32 copy rounds to the weight that has its place; copies of other types say nothing."""
    weights = dict(trained)
    for position, name in names.items():
        weight, master = weights[name], masters.get(position)
        if master is None or master.dtype != "float32" or weight.dtype not in HALVES:
            continue
        if bytes(cast(_first(master, files), master.dtype, weight.dtype)) != _first(weight, files):
            return False
    return True


def _by_shape(
    trained: Pool,
    positions: Sequence[Sequence[int]],
    shapes: Mapping[int, tuple[int, ...] | None],
) -> dict[int, str]:
    """Every group is a subsequence of the module's parameters; nothing where more than one fits."""
    left = [(name, tensor.shape) for name, tensor in trained]
    names: dict[int, str] = {}
    for group in positions:
        chosen = _only_subsequence(left, [shapes[at] for at in group])
        if chosen is None:
            return {}
        names |= {position: left[at][0] for position, at in zip(group, chosen, strict=True)}
        taken = set(chosen)
        left = [item for at, item in enumerate(left) if at not in taken]
    return names


def _by_value(trained: Pool, masters: Mapping[int, StoredTensor], count: int, files: Files) -> dict[int, str]:
    """The weight that each fp32 copy rounds to; nothing unless that is one weight for each and each time another."""
    known: dict[tuple[str, tuple[int, ...], bytes], list[str]] = {}
    for name, tensor in trained:
        known.setdefault((tensor.dtype, tensor.shape, _first(tensor, files)), []).append(name)
    dtypes = {tensor.dtype for _, tensor in trained if tensor.dtype in HALVES}
    names: dict[int, str] = {}
    for position, master in masters.items():
        start = _first(master, files)
        keys = [(dtype, master.shape, bytes(cast(start, master.dtype, dtype))) for dtype in dtypes]
        fitting = [name for key in keys for name in known.get(key, ())]
        if len(fitting) != 1 or master.dtype != "float32":
            return {}
        names[position] = fitting[0]
    return names if len(names) == count == len(set(names.values())) else {}


def _first(tensor: StoredTensor, files: Files) -> bytes:
    """The first elements, which are plenty to tell trained parameters apart."""
    if not tensor.size or not tensor.is_contiguous:
        return b""
    file, offset = tensor.at()
    return files.read(file, offset, min(tensor.size, COMPARED) * itemsize(tensor.dtype))


HALVES = ("bfloat16", "float16")
COMPARED = 4096


def _shape(state: object, master: StoredTensor | None) -> tuple[int, ...] | None:
    """The shape of a parameter by its states; None where it has none that say it."""
    if master is not None:
        return master.shape
    held = state.values() if isinstance(state, dict) else ()
    return next((value.shape for value in held if isinstance(value, StoredTensor) and value.shape), None)


def _only_subsequence(
    items: list[tuple[str, tuple[int, ...]]], wanted: list[tuple[int, ...] | None]
) -> list[int] | None:
    """The positions of ``wanted`` shapes (None is any) in ``items``, if there is exactly one way to pick in order."""
    first, last = _pick(items, wanted), _pick(items[::-1], wanted[::-1])
    if first is None or last is None:
        return None
    mirrored = [len(items) - 1 - at for at in reversed(last)]
    return first if first == mirrored else None


def _pick(items: list[tuple[str, tuple[int, ...]]], wanted: list[tuple[int, ...] | None]) -> list[int] | None:
    chosen: list[int] = []
    at = 0
    for shape in wanted:
        while at < len(items) and shape is not None and items[at][1] != shape:
            at += 1
        if at == len(items):
            return None
        chosen.append(at)
        at += 1
    return chosen
