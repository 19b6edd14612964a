"""Tensors put back among the values that they were saved beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import UnusableRequest
from ckptengine.sources.emit import Tensor
from ckptengine.sources.writer import Job

MAX_LIST_ITEMS = 1 << 24


def copied(value: Any) -> Any:
    """Plain values whose dicts and lists may be changed."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def place_in(values: object, path: Sequence[object]) -> tuple[object, ...]:
    """Where a tensor goes among values that are nested already: what of its path is a place in a list is a number.

    Its whole name where the path leads through something that is no container.
    """
    made: list[object] = []
    node, rest = values, list(path)
    while rest:
        part = rest.pop(0)
        if isinstance(node, list | tuple) and type(part) is str:  # a source that does not know keys from positions
            first, dot, more = part.partition(".")
            if first.isascii() and first.isdecimal() and len(first) < 10:
                part = int(first)
                rest[:0] = [more] if dot else []
        made.append(part)
        if node is None:
            continue
        if not isinstance(node, list | tuple if type(part) is int else dict):
            return (".".join(map(str, path)),)
        if isinstance(node, dict):
            node = node.get(part)
        else:
            node = node[part] if type(part) is int and part < len(node) else None
    return tuple(made)


def put_tensors(job: Job, root: dict[Any, Any] | list[Any], tensors: Mapping[str, Tensor]) -> None:
    """Tensors at their places; where something else is there or on the way, under their whole names.

    `UnusableRequest` where that is taken too: nothing replaces anything here.
    """
    for name, tensor in sorted(tensors.items(), key=lambda item: "." in item[0]):  # what has one place only comes first
        if not _set_free(root, place_in(root, job.place(name)), tensor) and not _set_free(root, (name,), tensor):
            raise UnusableRequest(
                f"{name!r} is both a tensor and a value, and a nested state has one place for them; convert to dcp"
            )


def _set_free(node: Any, path: Sequence[Any], tensor: Tensor) -> bool:
    """Put a tensor at a path of keys and list positions, if nothing is there; containers on the way are made."""
    part, rest = path[0], path[1:]
    if isinstance(node, list) and type(part) is int and part < MAX_LIST_ITEMS:
        node += [None] * (part + 1 - len(node))
        free = node[part] is None  # what a tensor leaves in a list of values
    elif isinstance(node, dict) and type(part) is str:
        free = part not in node
    else:
        return False
    if rest:
        if free:
            node[part] = [] if type(rest[0]) is int else {}
        if not isinstance(node[part], tuple):
            return _set_free(node[part], rest, tensor)
        opened = list(node[part])
        free = _set_free(opened, rest, tensor)
        if free:
            node[part] = tuple(opened)
        return free
    if free:
        node[part] = tensor
    return free
