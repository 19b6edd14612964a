"""The optimizer files of ZeRO as flat groups, one list for each model-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.sources.deepspeed.autoep import autoep_layers, is_expert, on_rank, whole_name
from ckptengine.sources.deepspeed.folder import StepFolder
from ckptengine.sources.deepspeed.groups import Group, check_mapping, dealt, dealt_back, even_group, sliced_group
from ckptengine.sources.deepspeed.header import (
    ModelStates,
    Shapes,
    int_list,
    load_dict,
    stage_of,
    tensor_list,
)
from ckptengine.sources.stored import StoredTensor
from ckptengine.sources.unpickle import Placeholder

_EP_GROUP = re.compile(r"ep_size_(\d+)")
_EXPERT = re.compile(r"(.*\bdeepspeed_experts\.)(\d+)(\..*)")
_DATA_FIRST = "use_data_before_expert_parallelism"


ModuleOf = Callable[[Mapping[str, int]], Mapping[str, StoredTensor]]


@dataclass(frozen=True, slots=True)
class Partitions:
    """What the optimizer files of one model-parallel rank hold.

    ``groups`` are flat groups; ``named_groups`` the optimizer's parameter groups: options and parameter names;
    ``rest`` the first rank's other values.
    """

    groups: tuple[Group, ...]
    named_groups: tuple[dict[Any, Any], ...]
    rest: Mapping[Any, Any]


@dataclass(frozen=True, slots=True)
class _RankFile:
    path: str
    state: dict[Any, Any]

    def list_of(self, key: str) -> list[StoredTensor]:
        return tensor_list(self.state.get(key), f"{self.path}: {key}")


def read_partitions(folder: StepFolder, mp: int, model: ModelStates, module_of: ModuleOf) -> Partitions:
    """The groups of model-parallel rank ``mp``, from all of its data-parallel ranks' files.

    ``module_of`` gives the module's tensors when told the names that the optimizer uses and their sizes.
    """
    first = _read(folder, folder.optim_ranks(mp, None if (mp, 0) in folder.optim else 1)[0])
    count = first.state.get("partition_count")
    counts = int_list(count) or ([count] if type(count) is int else [])
    ranks = max([*counts, 1]) if counts else model.dp_world_size
    paths = folder.optim_ranks(mp, ranks)
    if len(paths) < sum(rank == mp for rank, _ in folder.optim):
        raise UnreadableFormat(
            f"{folder.files.root} has more optimizer files for mp_rank {mp:02d} than the {len(paths)} ranks that wrote "
            "it; files of another run lie between them"
        )
    files = [first, *(_read(folder, path) for path in paths[1:])]
    if stage_of(first.state.get("zero_stage")) == 3 or "fp32_flat_groups" in first.state:
        return _stage3(files, model)
    return _stage12(files, model, counts, module_of)


def _read(folder: StepFolder, path: str) -> _RankFile:
    state = load_dict(folder.files, path).get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise UnreadableFormat(f"{folder.files.root}/{path} holds no optimizer_state_dict")
    return _RankFile(f"{folder.files.root}/{path}", state)


def _stage12(files: list[_RankFile], model: ModelStates, counts: list[int], module_of: ModuleOf) -> Partitions:
    masters = [file.list_of("single_partition_of_fp32_groups") for file in files]
    shuffled = "zero_stage" in files[0].state and model.round_robin  # the BF16_Optimizer takes no notice of it
    shapes = model.shapes
    if shapes is None:
        shapes = _mapped_shapes(files, module_of)
        if shuffled:
            pairs = zip(shapes, counts, strict=True)
            shapes = [{name: group[name] for name in dealt(list(group), count)} for group, count in pairs]
    if any(len(held) != len(shapes) for held in masters):
        raise UnreadableFormat(f"{files[0].path} does not hold {len(shapes)} groups, as the model file says")
    bases = [_base(file, len(shapes)) for file in files]
    alignment = files[0].state.get("param_alignment_paddings")
    groups: list[Group] = []
    named: list[dict[Any, Any]] = []
    for g, names in enumerate(shapes):
        options = bases[0][1][g]
        paddings = int_list(alignment[g]) if isinstance(alignment, list) and g < len(alignment) else None
        count = counts[g] if g < len(counts) else len(files)
        shown: list[str] = []
        for ranks, renamed in _expert_ranks(names, options, len(files), count, model):
            group = even_group(
                f"{files[0].path}, group {g}",
                renamed,
                paddings,
                [masters[rank][g] for rank in ranks],
                [bases[rank][0][g] for rank in ranks],
                _unit(files, masters, bases, ranks, g),
                options,
            )
            if renamed is names and not shuffled:
                check_mapping(f"{files[0].path}, group {g}", group, [_mapping(files[rank], g) for rank in ranks])
            groups.append(group)
            shown += map(whole_name, dealt_back(list(renamed), len(ranks)) if shuffled else renamed)
        shown = list(dict.fromkeys(shown))
        named.append({**{key: value for key, value in options.items() if key != "params"}, "params": shown})
    rest = {key: value for key, value in files[0].state.items() if key not in _TENSOR_KEYS}
    return Partitions(tuple(groups), tuple(named), rest)


_TENSOR_KEYS = {
    "base_optimizer_state",
    "single_partition_of_fp32_groups",
    "param_slice_mappings",
    "fp32_flat_groups",
    "optimizer_state_dict",
}


def _base(file: _RankFile, count: int) -> tuple[list[Mapping[Any, Any]], list[Mapping[Any, Any]]]:
    """The base optimizer's states and options by group.  Elastic checkpoints keep a list of states and no options."""
    base = file.state.get("base_optimizer_state")
    if isinstance(base, list):
        step = file.state.get("base_optimizer_state_step")
        options: Mapping[Any, Any] = {} if step is None else {"step": step}
        states = [state if isinstance(state, dict) else {} for state in base]
        return [*states, *({} for _ in range(count - len(states)))], [options] * count
    if not isinstance(base, dict) or not isinstance(base.get("param_groups"), list):
        raise UnreadableFormat(f"{file.path} holds no base_optimizer_state")
    held = base.get("state")
    by_group: list[Mapping[Any, Any]] = []
    hyper: list[Mapping[Any, Any]] = []
    for g in range(count):
        options = base["param_groups"][g] if g < len(base["param_groups"]) else {}
        options = options if isinstance(options, dict) else {}
        members = options.get("params")
        key = members[0] if isinstance(members, list) and members else g
        state = held.get(key, {}) if isinstance(held, dict) else {}
        by_group.append(state if isinstance(state, dict) else {})
        hyper.append(options)
    return by_group, hyper


def _unit(
    files: list[_RankFile],
    masters: list[list[StoredTensor]],
    bases: list[tuple[list[Mapping[Any, Any]], list[Mapping[Any, Any]]]],
    ranks: Sequence[int],
    g: int,
) -> int:
    """Elements of one rank's partition, padding included.

    Only the last ranks' partitions are padded, and of them masters (and elastic states) are stored without padding.
    """
    sizes = [masters[rank][g].size for rank in ranks]
    for rank in ranks:
        paddings = int_list(files[rank].state.get("group_paddings"))
        if paddings is not None and g < len(paddings) and "zero_stage" in files[rank].state:
            sizes.append(masters[rank][g].size + paddings[g])
        sizes += [t.size for t in bases[rank][0][g].values() if isinstance(t, StoredTensor) and len(t.shape) == 1]
    unit = max(sizes)
    first = masters[ranks[0]][g].size
    if len(ranks) > 1 and any(masters[rank][g].size for rank in ranks[1:]) and first != unit:
        raise Damaged(f"{files[ranks[0]].path}: group {g} has {first} elements on the first rank, not {unit}")
    return unit


def _expert_ranks(
    names: Shapes, options: Mapping[Any, Any], ranks: int, count: int, model: ModelStates
) -> list[tuple[list[int], Shapes]]:
    """Which ranks share a group, and under what names.

    An expert group is shared by every ``ep_size``-th rank only (by ranks in a row where the configuration puts data
    before expert parallelism), and the other ranks hold other experts under the same local numbers.
    """
    match = _EP_GROUP.fullmatch(str(options.get("name", ""))) if options.get("moe") is True else None
    size = int(match[1]) if match else (ranks // count if options.get("moe") is True and count else 1)
    if size <= 1:
        return [(list(range(ranks)), names)]
    if ranks % size:
        raise UnreadableFormat(f"{ranks} ranks do not form expert-parallel groups of {size}")
    config = model.rest.get("ds_config")
    in_rows = isinstance(config, dict) and config.get(_DATA_FIRST) is True
    each = ranks // size
    shared = [list(range(ep * each, ep * each + each) if in_rows else range(ep, ranks, size)) for ep in range(size)]
    return [(held, _on_expert_rank(names, ep, model)) for ep, held in enumerate(shared)]


def _on_expert_rank(names: Shapes, ep: int, model: ModelStates) -> Shapes:
    """The parameters of one expert-parallel rank: DeepSpeed's own experts under their global numbers."""
    layers = autoep_layers(model)
    local = 1 + max((int(match[2]) for name in names if (match := _EXPERT.fullmatch(name))), default=-1)
    found: Shapes = {}
    for name, dims in names.items():
        if _EXPERT.fullmatch(name):
            found[_global(name, ep * local)] = dims
        elif is_expert(name, layers):
            found[on_rank(name, ep)] = dims
        else:
            raise UnreadableFormat(
                f"{model.path}: {name} is in a group of experts, but no expert of DeepSpeed's layers or of AutoEP, so "
                "that it is unknown what the other ranks hold of it"
            )
    return found


def _global(name: str, first: int) -> str:
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}{int(match[2]) + first}{match[3]}" if match else name


def _mapping(file: _RankFile, g: int) -> object:
    mappings = file.state.get("param_slice_mappings")
    return mappings[g] if isinstance(mappings, list) and g < len(mappings) else None


def _mapped_shapes(files: list[_RankFile], module_of: ModuleOf) -> list[Shapes]:
    """The groups' parameters in flat order by the ranks' slice mappings, where the model file does not list them."""
    groups: list[dict[str, int]] = []
    for g in range(len(files[0].list_of("single_partition_of_fp32_groups"))):
        sizes: dict[str, int] = {}
        for file in files:
            mapping = _mapping(file, g)
            if not isinstance(mapping, dict):
                raise UnreadableFormat(f"{file.path} does not say which parameters its flat groups hold")
            for name in sorted(mapping, key=lambda name: _address(mapping[name], "start")):
                sizes[name] = sizes.get(name, 0) + _address(mapping[name], "numel")
        groups.append(sizes)
    module = module_of({name: size for sizes in groups for name, size in sizes.items()})
    missing = [name for sizes in groups for name in sizes if name not in module]
    if missing:
        raise UnreadableFormat(f"{files[0].path} maps the parameter {missing[0]!r}, which the model files lack")
    return [{name: module[name].shape for name in sizes} for sizes in groups]


def _address(address: object, key: str) -> int:
    """The start or length of a parameter's slice in a rank's partition."""
    number = address.get(key) if isinstance(address, Placeholder) else None
    if type(number) is not int:
        raise UnreadableFormat(f"a slice mapping of the optimizer files has no {key}")
    return number


def _stage3(files: list[_RankFile], model: ModelStates) -> Partitions:
    if model.shapes is None:
        raise UnreadableFormat(f"{model.path} has no param_shapes; without them ZeRO-3's partitions have no meaning")
    masters = [file.list_of("fp32_flat_groups") for file in files]
    if any(len(held) != len(model.shapes) for held in masters):
        raise UnreadableFormat(f"{files[0].path} does not hold {len(model.shapes)} sub-groups, as the model file says")
    inner = [file.state.get("optimizer_state_dict") for file in files]
    states = [held.get("state") if isinstance(held, dict) else None for held in inner]
    options = _options_by_group(inner[0], len(model.shapes))
    groups: list[Group] = []
    for g, names in enumerate(model.shapes):
        by_rank = [state.get(g) if isinstance(state, dict) else None for state in states]
        sets = _sharing(files, g)
        for ep, ranks in enumerate(sets):
            groups.append(
                sliced_group(
                    f"{files[0].path}, sub-group {g}",
                    names if len(sets) == 1 else _on_expert_rank(names, ep, model),
                    [masters[rank][g] for rank in ranks],
                    [state if isinstance(state := by_rank[rank], dict) else {} for rank in ranks],
                    options[g][1],
                )
            )
    named: dict[int, dict[Any, Any]] = {}
    for g, names in enumerate(model.shapes):
        position, hyper = options[g]
        group = named.setdefault(position, {**{k: v for k, v in hyper.items() if k != "params"}, "params": []})
        group["params"] += list(names)
    rest = {key: value for key, value in files[0].state.items() if key not in _TENSOR_KEYS}
    return Partitions(tuple(groups), tuple(named[position] for position in sorted(named)), rest)


def _sharing(files: list[_RankFile], g: int) -> list[list[int]]:
    """The sets of ranks that share a sub-group: one, or with AutoEP one for each expert-parallel rank."""
    held: list[list[int]] = []
    for file in files:
        groups = file.state.get("ds_zero_partition_groups")
        entry = groups[g] if isinstance(groups, list) and g < len(groups) and isinstance(groups[g], dict) else None
        ranks = int_list(entry.get("partition_ranks")) if entry is not None else list(range(len(files)))
        if ranks is None:
            raise UnreadableFormat(f"{file.path} does not say which ranks share its sub-group {g}")
        if ranks not in held:
            held.append(ranks)
    if sorted(rank for ranks in held for rank in ranks) != list(range(len(files))):
        raise UnreadableFormat(
            f"{files[0].path}: the ranks that share sub-group {g} are not {len(files)} different ones"
        )
    return sorted(held)


def _options_by_group(inner: object, count: int) -> list[tuple[int, Mapping[Any, Any]]]:
    """For each sub-group the parameter group that it belongs to: its position and options."""
    found: dict[int, tuple[int, Mapping[Any, Any]]] = {}
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    for position, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict):
            members = int_list(group.get("params")) or []
            found |= dict.fromkeys(members, (position, group))
    return [found.get(g, (0, {})) for g in range(count)]
