"""Stored values for a reader without the live state: everything that is not a tensor, nested as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptengine.state.decoding import Decoder, malformed
from ckptengine.state.encoding import Json

_DROPPED = object()
ReadArray = Callable[[str, str, tuple[int, ...]], object]
"""Reads a large numpy array from (tensor name, numpy dtype, shape)."""


def readable(data: Json, array: ReadArray) -> Any:
    """Decode stored values.

    A tensor leaves no trace in a dict and None in a sequence; a module gives its extra state, an optimizer its
    ``param_groups`` (with parameter names), an object its ``state_dict``; what is per rank is left out.  Types that
    this process has not registered become `Opaque`.
    """

    def leaf(node: dict[str, Any], decoder: Decoder) -> object:
        tag = node["$"]
        if tag == "module":
            extra = node.get("extra") or {}
            return {key: decoder.decode(part) for key, part in extra.items()} if extra else _DROPPED
        if tag == "optimizer":
            return _optimizer(node, decoder)
        if tag == "object":
            return decoder.decode(node["state"])
        if tag == "ndarray":
            return array(node["tensor"], node["dtype"], tuple(node["shape"]))
        if tag not in ("tensor", "per_rank"):  # what each rank keeps for itself
            raise malformed(f"unknown tag {tag!r}; written by a newer version?")
        return _DROPPED

    value = _without_dropped(Decoder(leaf=leaf).decode(data))
    return {} if value is _DROPPED else value


def _optimizer(node: dict[str, Any], decoder: Decoder) -> dict[str, object]:
    groups = []
    for group in node["groups"]:
        values = decoder.decode(group["values"])
        assert isinstance(values, dict)
        groups.append({"params": list(group["params"]), **values})
    found: dict[str, object] = {"param_groups": groups}
    if node.get("state"):
        found["state"] = {key: decoder.decode(part) for key, part in node["state"].items()}
    if node.get("shared"):
        found["shared"] = decoder.decode(node["shared"])
    return found


def _without_dropped(value: Any) -> Any:
    """Take the marks of tensors out of plain dicts and lists; other containers keep None in their place."""
    if isinstance(value, dict):
        for key in [key for key, part in value.items() if part is _DROPPED]:
            del value[key]
        for key, part in value.items():
            value[key] = _without_dropped(part)
        return value
    if type(value) is list:
        return [None if part is _DROPPED else _without_dropped(part) for part in value]
    if type(value) is tuple:
        return tuple(None if part is _DROPPED else _without_dropped(part) for part in value)
    return value
