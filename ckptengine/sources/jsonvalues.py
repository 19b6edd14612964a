"""Plain values as JSON that other tools can read, for formats whose own place for values is JSON or nothing.

What JSON has stays as it is.  Everything else is a dict with one key that says what it is: ``{"$tuple": [...]}``,
``{"$set": [...]}``, ``{"$bytes": base64}``, ``{"$complex": [re, im]}``, ``{"$float": "inf"}``, ``{"$items": [[key,
value], ...]}`` for a dict with other keys than strings, ``{"$array": {...}}`` for a numpy array.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ckptengine.errors import Damaged, UnsupportedValue


def to_json(value: object, name: str = "values") -> Any:
    """``value`` as a JSON document; `UnsupportedValue` naming the place of what is no plain value."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return to_json(value.item(), name)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(item, f"{name}.{key}") for key, item in value.items()}
        return {"$items": [[to_json(key, name), to_json(item, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, list):
        return _items(value, name)
    if isinstance(value, tuple):
        return {"$tuple": _items(value, name)}
    if isinstance(value, set | frozenset):
        return {"$set": _items(sorted(value, key=repr), name)}
    if isinstance(value, bytes | bytearray):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"$complex": [to_json(value.real), to_json(value.imag)]}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.dtype.fields is None:
        little = value.astype(value.dtype.newbyteorder("<"))
        data = base64.b64encode(little.tobytes()).decode()
        return {"$array": {"dtype": little.dtype.str, "shape": list(value.shape), "data": data}}
    raise UnsupportedValue(f"{name}: a {type(value).__name__} is no plain value and cannot be written as JSON")


def _items(value: list[Any] | tuple[Any, ...], name: str) -> list[Any]:
    return [to_json(item, f"{name}[{number}]") for number, item in enumerate(value)]


def from_json(document: Any) -> Any:
    """The inverse of `to_json`; `Damaged` for what it would not have written."""
    if isinstance(document, list):
        return [from_json(item) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "") if len(document) == 1 else ""
    if not tag.startswith("$"):
        return {key: from_json(item) for key, item in document.items()}
    try:
        return _TAGS[tag](document[tag])
    except (KeyError, TypeError, ValueError):
        raise Damaged(f"a value tagged {tag!r} is not what it should be") from None


def _array(fields: Any) -> Any:
    dtype = np.dtype(fields["dtype"])
    if dtype.hasobject:
        raise ValueError("objects")
    return np.frombuffer(base64.b64decode(fields["data"]), dtype).reshape(fields["shape"])


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda items: tuple(from_json(items)),
    "$set": lambda items: set(from_json(items)),
    "$bytes": base64.b64decode,
    "$complex": lambda parts: complex(*from_json(parts)),
    "$float": float,
    "$items": lambda pairs: {from_json(key): from_json(item) for key, item in pairs},
    "$array": _array,
}
