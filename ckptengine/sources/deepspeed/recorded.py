"""What a DeepSpeed checkpoint itself says of its tensor-parallel pieces, as rules: ``universal_checkpoint_info``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptengine.errors import UnreadableFormat
from ckptengine.sources.deepspeed.header import int_list
from ckptengine.sources.rules.language import Averaged, Layout, Replicated, Rule, Rules, Sharded

INFO = "universal_checkpoint_info"


def recorded_rules(rest: Mapping[Any, Any], names: Sequence[str], where: str) -> Rules | None:
    """One rule for each parameter that the model file's ``rest`` describes; None where it describes none.

    A parameter that is not described, or called unsupported, gets no rule, and so is refused where it is cut.
    """
    info = rest.get(INFO)
    if not isinstance(info, dict):
        return None
    try:
        known = [(re.compile(pattern), layout) for pattern, layout in _layouts(info)]
    except re.error as error:
        raise UnreadableFormat(f"{where}: a pattern of {INFO} is not a regular expression: {error}") from None
    rules = []
    for name in names:
        layout = next((layout for pattern, layout in known if pattern.match(name)), None)
        if layout is not None:
            rules.append(Rule(re.compile(re.escape(name)), f"{where}: {INFO}", True, 0, layout))
    return Rules(INFO, tuple(rules)) if rules else None


def _layouts(info: Mapping[Any, Any]) -> Iterator[tuple[str, Layout | None]]:
    """Patterns and what they say, the most particular ones first."""
    unsupported = info.get("autotp_unsupported_parameter_patterns")
    yield from ((str(pattern), None) for pattern in (unsupported if isinstance(unsupported, dict) else ()))
    widths = info.get("sub_param_shard_widths")
    for entry in _list(info.get("parameter_with_sub_params")):
        if isinstance(entry, dict):
            for pattern in _list(entry.get("patterns")):
                yield str(pattern), _fused(entry, widths.get(pattern) if isinstance(widths, dict) else None)
    plain: dict[str, Layout] = {
        "parameter_with_2_sub_params_cat_dim_0": Sharded(0, (1, 1)),
        "tp_replicated_parameter_patterns": Replicated(),
        "parameter_to_average_patterns": Averaged(),
        "parameter_with_row_parallelism_patterns": Sharded(1),
    }
    for key, layout in plain.items():
        yield from ((str(pattern), layout) for pattern in _list(info.get(key)))
    maps = info.get("affine_map")
    described = maps.get("params") if isinstance(maps, dict) else None
    for pattern, entry in (described if isinstance(described, dict) else {}).items():
        yield str(pattern), _along(entry)


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _fused(entry: Mapping[Any, Any], widths: object) -> Layout | None:
    """Several parts along one dimension, each cut by itself; the widths of the pieces where they are recorded."""
    dim, shape = entry.get("partition_dim"), _list(entry.get("shape"))
    if type(dim) is not int or not 0 <= dim < len(shape):
        return None
    rows = [int_list(row) for row in _list(widths)]
    if rows and all(row for row in rows):
        return Sharded(dim, widths=tuple(tuple(row) for row in rows if row))
    parts = int_list(shape[dim]) if isinstance(shape[dim], list | tuple) else None
    if parts is None and type(shape[dim]) is int and shape[dim] > 0:
        parts = [1] * shape[dim]
    if not parts or any(part < 1 for part in parts):
        return None
    return Sharded(dim, tuple(part // math.gcd(*parts) for part in parts))


def _along(entry: object) -> Layout | None:
    """The one dimension along which the ranks' pieces make the logical shape; None where that is not so."""
    whole = int_list(entry.get("logical_shape")) if isinstance(entry, dict) else None
    ranks = entry.get("ranks") if isinstance(entry, dict) else None
    if not whole or not isinstance(ranks, dict):
        return None
    pieces = [rank for rank in ranks.values() if isinstance(rank, dict)]
    shapes = [int_list(rank.get("shard_shape")) or [] for rank in pieces]
    if any(len(shape) != len(whole) for shape in shapes) or any(len(_list(rank.get("pieces"))) > 1 for rank in pieces):
        return None
    cut = [dim for dim, extent in enumerate(whole) if any(shape[dim] != extent for shape in shapes)]
    if not cut:
        return Replicated()
    return Sharded(cut[0]) if len(cut) == 1 and sum(shape[cut[0]] for shape in shapes) == whole[cut[0]] else None
