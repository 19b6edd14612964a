"""The values of several ranks as one.

Ranks hold different modules and parameters under pipeline and expert parallelism; everything else must be equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptengine.errors import RanksDisagree
from ckptengine.state.encoding import Json, dumps

_SHOWN = 10
_MAPPINGS = ("dict", "OrderedDict", "defaultdict", "Counter")


def merge_values(by_rank: Sequence[Json]) -> Json:
    """One tree of values from those of all ranks.

    The entries of dicts, the extra state of modules, and the parameters of optimizers (group by group) are united; a
    value that several ranks have must be equal on all of them.  `RanksDisagree` lists every place where it is not.
    """
    if len(by_rank) == 1:
        return by_rank[0]
    ranks = list(range(len(by_rank)))
    texts = {dumps(data) for data in by_rank}
    if len(texts) == 1:
        return by_rank[0]
    problems: list[str] = []
    merged = _merge(list(by_rank), ranks, "", problems)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RanksDisagree(
            f"plain values of the state differ between ranks: {'; '.join(problems[:_SHOWN])}{more}; "
            f"wrap what belongs to each rank alone in PerRank, or make it equal"
        )
    return merged


def merge_aliases(by_rank: Sequence[Mapping[str, str]], stored: Sequence[frozenset[str]]) -> dict[str, str]:
    """The ties of all ranks.  A name that is tied on one rank and stored on its own by another is no alias.

    ``stored`` are the names of each rank's tensors.  A tied name leads to the owner that is stored by some rank.
    """
    names = frozenset().union(*stored)
    merged: dict[str, str] = {}
    for aliases in by_rank:
        for alias, owner in aliases.items():
            if alias not in names:
                merged.setdefault(alias, owner)
    return merged


def _merge(data: list[Json], ranks: list[int], name: str, problems: list[str]) -> Json:
    """``data[i]`` is what ``ranks[i]`` has under ``name``."""
    if len({dumps(one) for one in data}) == 1:
        return data[0]
    lists = [one for one in data if isinstance(one, list)]
    if len(lists) == len(data) and len({len(one) for one in lists}) == 1:
        return _merge_columns(lists, ranks, name, problems)
    nodes = [one for one in data if isinstance(one, dict)]
    tags = {str(node.get("$")) for node in nodes}
    if len(nodes) < len(data) or (len(tags) > 1 and not tags <= {"None", "dict"}):
        return _differ(data, ranks, name, problems)
    tag = tags.pop() if len(tags) == 1 else "dict"
    if tag == "optimizer":
        return _merge_optimizers(nodes, ranks, name, problems)
    if tag == "module":
        extra = _merge_entries([_entries(node.get("extra", {})) for node in nodes], ranks, name, problems)
        return {"$": "module", "extra": dict(extra)} if extra else {"$": "module"}  # type: ignore[arg-type]
    if tag in ("None", "dict"):
        entries = _merge_entries([_entries(_items(node)) for node in nodes], ranks, name, problems)
        return {"$": "dict", "items": [[key, part] for key, part in entries]}
    if tag in _MAPPINGS or tag not in ("tuple", "namedtuple", "dataclass"):
        return _differ(data, ranks, name, problems)
    return _merge_fixed(nodes, ranks, name, problems)


def _differ(data: list[Json], ranks: list[int], name: str, problems: list[str]) -> Json:
    first = dumps(data[0])
    other = next(i for i, one in enumerate(data) if dumps(one) != first)
    problems.append(
        f"{name or 'the state'} is {first[:60]} on rank {ranks[0]} and {dumps(data[other])[:60]} on rank {ranks[other]}"
    )
    return data[0]


def _items(node: dict[str, Json]) -> Json:
    return node.get("items", []) if node.get("$") == "dict" else node


def _entries(data: Json) -> list[tuple[Json, Json]]:
    """Key and value pairs of either form of a mapping, still encoded."""
    if isinstance(data, dict):
        return [(key, part) for key, part in data.items()]
    return [(pair[0], pair[1]) for pair in data if isinstance(pair, list)] if isinstance(data, list) else []


def _merge_entries(
    data: list[list[tuple[Json, Json]]], ranks: list[int], name: str, problems: list[str]
) -> list[tuple[Json, Json]]:
    """The union of mappings, in the order in which keys are first met."""
    held: dict[str, tuple[Json, list[Json], list[int]]] = {}
    for rank, entries in zip(ranks, data, strict=True):
        for key, part in entries:
            _, parts, holders = held.setdefault(dumps(key), (key, [], []))
            parts.append(part)
            holders.append(rank)
    return [
        (key, _merge(parts, holders, f"{name}.{_told(key)}" if name else _told(key), problems))
        for key, parts, holders in held.values()
    ]


def _told(key: Json) -> str:
    return key if isinstance(key, str) else dumps(key)


def _merge_columns(lists: list[list[Json]], ranks: list[int], name: str, problems: list[str]) -> list[Json]:
    """Lists of one length, entry by entry."""
    prefix = f"{name}." if name else ""
    columns = enumerate(zip(*lists, strict=True))
    return [_merge(list(column), ranks, f"{prefix}{i}", problems) for i, column in columns]


def _merge_fixed(nodes: list[dict[str, Json]], ranks: list[int], name: str, problems: list[str]) -> Json:
    """Tuples and structures of the same shape: part by part."""
    part = "v" if nodes[0].get("$") == "tuple" else "fields"
    bodies = [node.get(part) for node in nodes]
    lists = [body for body in bodies if isinstance(body, list)]
    if len(lists) == len(bodies) and len({len(body) for body in lists}) == 1:
        return {**nodes[0], part: _merge_columns(lists, ranks, name, problems)}
    dicts = [body for body in bodies if isinstance(body, dict)]
    if len(dicts) == len(bodies) and len({frozenset(body) for body in dicts}) == 1:
        keys = {key: _merge([body[key] for body in dicts], ranks, f"{name}.{key}", problems) for key in dicts[0]}
        return {**nodes[0], part: keys}
    return _differ(list(nodes), ranks, name, problems)


def _merge_optimizers(nodes: list[dict[str, Json]], ranks: list[int], name: str, problems: list[str]) -> Json:
    """The same groups with every rank's parameters; ranks without parameters in a group say nothing about it."""
    merged: dict[str, Json] = {"$": "optimizer"}
    _require_equal("type", nodes, ranks, name, merged, problems)
    lists = [node.get("groups") for node in nodes]
    counts = {len(groups) for groups in lists if isinstance(groups, list)}
    if len(counts) != 1:
        problems.append(
            f"{name} has {sorted(counts)} parameter groups on different ranks; give every rank the same groups, empty "
            f"where it holds none of their parameters"
        )
        return nodes[0]
    groups: list[Json] = []
    for index in range(counts.pop()):
        column = [groups_[index] for groups_ in lists if isinstance(groups_, list)]
        parts = [part for part in column if isinstance(part, dict)]
        everyone = list(zip(ranks, parts, strict=True))
        told = [(rank, part) for rank, part in everyone if part.get("params")] or everyone[:1]
        params: dict[str, None] = {}
        for _, part in told:
            listed = part.get("params")
            params.update(dict.fromkeys(str(one) for one in listed) if isinstance(listed, list) else {})
        place = f"{name}.param_groups.{index}"
        values = _merge([part.get("values") for _, part in told], [rank for rank, _ in told], place, problems)
        groups.append({"params": list(params), "values": values})
    merged["groups"] = groups
    state = _merge_entries([_entries(node.get("state", {})) for node in nodes], ranks, name, problems)
    merged["state"] = {str(key): part for key, part in state}
    if any("shared" in node for node in nodes):
        _require_equal("shared", nodes, ranks, name, merged, problems)
    return merged


def _require_equal(
    key: str, nodes: list[dict[str, Json]], ranks: list[int], name: str, merged: dict[str, Json], problems: list[str]
) -> None:
    merged[key] = _merge([node.get(key) for node in nodes], ranks, f"{name}.{key}", problems)
