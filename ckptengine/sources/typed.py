"""Our own typed encoding of values as plain values, without torch and without any of the user's classes.

`ckptengine.state` decodes the same data into live objects; this is what showing, comparing and converting need.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.sources.writer import Job

MAX_DEPTH = 200
DROPPED = object()
"""In the place of a tensor: it leaves no trace (None inside a list)."""


def decode_values(document: Any) -> object:
    """The encoded state as plain values: dicts, lists, numbers, text, bytes, numpy arrays.

    Tensors leave no trace.  An optimizer is a dict with ``param_groups``, each with the names of its ``params``; an
    object is its state; a value of a class of the user's is a dict with its class under ``"__class__"``.
    Raises `UnreadableFormat` for data that the encoder would not have written.
    """
    try:
        made = _decode(document, 0)
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise UnreadableFormat(f"the stored values are malformed: {type(error).__name__}: {error}") from error
    return {} if made is DROPPED else made


def plain_values(job: Job) -> object:
    """The values of a conversion as plain values, from the typed encoding where the source holds that."""
    return job.values if job.encoded_values is None else decode_values(job.encoded_values)


def _decode(data: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise UnreadableFormat(f"stored values are nested deeper than {MAX_DEPTH} levels")
    if isinstance(data, list):
        return [None if item is DROPPED else item for item in (_decode(part, depth + 1) for part in data)]
    if not isinstance(data, dict):
        return data
    if "$" not in data:
        return _mapping(data.items(), depth)
    read = _TAGS.get(data["$"])
    if read is None:
        raise UnreadableFormat(f"a stored value is tagged {data['$']!r}, which this version does not know")
    return read(data, depth + 1)


def _mapping(pairs: Iterable[tuple[str, Any]], depth: int) -> Any:
    made, dropped = {}, False
    for key, part in pairs:
        item = _decode(part, depth + 1)
        if item is DROPPED:
            dropped = True
        else:
            made[key] = item
    return DROPPED if dropped and not made else made


def _items(node: dict[str, Any], depth: int) -> Any:
    """Shared by dicts of every kind: an object, or pairs where keys are no simple strings."""
    items = node["items"]
    if isinstance(items, dict):
        return _mapping(items.items(), depth)
    return _mapping(((_hashable(_decode(key, depth)), part) for key, part in items), depth)


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        return str(key)
    return key


def _list(node: dict[str, Any], depth: int) -> list[Any]:
    made = _decode(node["v"], depth)
    if not isinstance(made, list):
        raise TypeError("expected a list")
    return made


def _optimizer(node: dict[str, Any], depth: int) -> Any:
    groups = []
    for group in node["groups"]:
        values = _decode(group["values"], depth)
        groups.append({**({} if values is DROPPED else values), "params": list(group["params"])})
    made: dict[str, Any] = {"param_groups": groups}
    for name in ("state", "shared"):
        rest = _decode(node.get(name, {}), depth)
        if rest is not DROPPED and rest:
            made[name] = rest
    return made


def _module(node: dict[str, Any], depth: int) -> Any:
    return _decode(node["extra"], depth) if "extra" in node else DROPPED


def _array(node: dict[str, Any], depth: int) -> Any:
    if "tensor" in node:
        return DROPPED
    dtype = np.dtype(node["dtype"])
    if dtype.hasobject:
        raise TypeError("an array of objects")
    return np.frombuffer(base64.b64decode(node["v"], validate=True), dtype).reshape(node["shape"])


def _number(node: dict[str, Any], depth: int) -> Any:
    return np.frombuffer(base64.b64decode(node["v"], validate=True), np.dtype(node["dtype"]))[0].item()


def _tagged(node: dict[str, Any], depth: int) -> Any:
    """A value of a user's class: its class and its parts."""
    made = {"__class__": node["type"]}
    for name in ("name", "value", "fields"):
        if name in node:
            part = _decode(node[name], depth)
            made |= {} if part is DROPPED else {name: part}
    return made


def _text(node: dict[str, Any], depth: int) -> str:
    return str(node["v"])


def _parts(node: dict[str, Any], depth: int) -> Any:
    """What plain values have no form of: its tag and its parts."""
    return {"__class__": node["$"]} | {key: _decode(part, depth) for key, part in node.items() if key != "$"}


_TAGS: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "int": lambda n, d: int(n["v"], 16),
    "float": lambda n, d: struct.unpack("<d", bytes.fromhex(n["v"]))[0],
    "complex": lambda n, d: complex(*struct.unpack("<dd", bytes.fromhex(n["v"]))),
    "str": lambda n, d: base64.b64decode(n["v"], validate=True).decode("utf-8", "surrogatepass"),
    **dict.fromkeys(("bytes", "bytearray", "BytesIO"), lambda n, d: base64.b64decode(n["v"], validate=True)),
    "tuple": lambda n, d: tuple(_list(n, d)),
    "torch.Size": lambda n, d: tuple(_list(n, d)),
    "deque": _list,
    **dict.fromkeys(("set", "frozenset"), lambda n, d: {_hashable(item) for item in _list(n, d)}),
    **dict.fromkeys(("dict", "OrderedDict", "Counter", "defaultdict"), _items),
    **dict.fromkeys(("enum", "namedtuple", "dataclass", "registered"), _tagged),
    **dict.fromkeys(("range", "slice", "timedelta", "fraction", "random.Random", "torch.Generator", "numpy.random"),
                    _parts),
    **dict.fromkeys(("path", "datetime", "date", "uuid", "decimal", "torch.device"), _text),
    "torch.dtype": lambda n, d: f"torch.{n['v']}",
    "ndarray": _array,
    "numpy": _number,
    "tensor": lambda n, d: DROPPED,
    "per_rank": lambda n, d: DROPPED,
    "module": _module,
    "optimizer": _optimizer,
    "object": lambda n, d: _decode(n["state"], d),
}  # fmt: skip
