"""Typed encoding of plain values as JSON data: exact, closed, and never executed when read.

A value that JSON has is itself: None, bool, int below 2**63, finite float, string, list, and a dict whose keys are
ASCII strings in sorted order, none starting with ``$``.  A dict in any other order is a list of pairs, so that
documents may be written with sorted keys.  Everything else is an object ``{"$": <tag>, ...}``; the tags are the keys of
`ckptengine.state.decoding.DECODERS`.

Values that are not plain (tensors, modules, optimizers, objects with a state) are given to a *leaf hook*, which
returns their encoding, and come back through the decoder's leaf hook.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol

from ckptengine.errors import CheckpointError, UnsupportedValue
from ckptengine.state import names, registry

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

MAX_DEPTH = 96
"""Nesting beyond this is refused, when writing and when reading."""

FACTORIES: dict[str, type] = {"list": list, "dict": dict, "int": int, "float": float, "set": set, "str": str,
                              "tuple": tuple, "bool": bool, "Counter": Counter, "deque": deque}  # fmt: skip
"""The default factories that a stored defaultdict can name."""

_INT_LIMIT = 1 << 63


class LeafHook(Protocol):
    """Encodes what is not a plain value; returns `NotImplemented` for a value that it does not know either."""

    def __call__(self, value: object, name: str) -> Any: ...


class MappingHook(Protocol):
    """Encodes the entries of a mapping in place of `items_of`."""

    def __call__(self, value: dict[Any, Any], name: str) -> Json: ...


Encode = Callable[["Encoder", Any, str], Json]
ENCODERS: dict[type, Encode] = {}
"""How values of exactly this type are written; `ckptengine.state.scalars` adds the types of numpy and torch."""


class Encoder:
    """Writes plain values; remembers in ``types`` every structured type that it met, by stored name."""

    def __init__(self, leaf: LeafHook | None = None) -> None:
        self.leaf = leaf
        self.mapping: MappingHook | None = None
        self.types: dict[str, type] = {}
        self._open: set[int] = set()

    def encode(self, value: object, name: str = "") -> Json:
        """The JSON data of ``value``; ``name`` is where it sits in the state, for messages and for its tensors.

        Raises `UnsupportedValue` for a value without an encoding, a cycle, or nesting beyond `MAX_DEPTH`.
        """
        encode = ENCODERS.get(type(value))
        if encode is not None:
            return encode(self, value, name)
        if self.leaf is not None:
            found = self.leaf(value, name)
            if found is not NotImplemented:
                return found  # type: ignore[no-any-return]
        return self._encode_other(value, name)

    def enter(self, value: object, name: str) -> None:
        """Begin the parts of a container; refuses a container that is its own part."""
        if id(value) in self._open:
            raise UnsupportedValue(f"{where(name)} contains itself; a state must be a tree, break the cycle")
        if len(self._open) >= MAX_DEPTH:
            raise UnsupportedValue(f"{where(name)} is nested more than {MAX_DEPTH} levels deep")
        self._open.add(id(value))

    def exit(self, value: object) -> None:
        self._open.discard(id(value))

    def plain(self, value: object, name: str) -> Json:
        """Encode without the leaf hook: for keys and set members, where no tensor can sit."""
        leaf, self.leaf = self.leaf, None
        try:
            return self.encode(value, name)
        finally:
            self.leaf = leaf

    def key_component(self, key: object, name: str) -> str:
        """The escaped name component of a dictionary key."""
        if type(key) is str:
            return names.escape(key)
        if type(key) is int and -_INT_LIMIT < key < _INT_LIMIT:
            return names.escape(key)
        return names.escape(names.TypedKey(dumps(self.plain(key, f"{name} (a key)"))))

    def _encode_other(self, value: object, name: str) -> Json:
        kind = type(value)
        codec = registry.codec_of(kind)
        if codec is not None:
            return self._encode_registered(codec, value, name)
        if isinstance(value, enum.Enum):
            stored = registry.stored_name(kind)
            self.types[stored] = kind
            return {"$": "enum", "type": stored, "name": value.name, "value": self.plain(value.value, name)}
        if isinstance(value, tuple) and registry.is_structured(kind):
            fields = dict(zip(kind._fields, value, strict=True))  # type: ignore[attr-defined]
            return self._encode_fields("namedtuple", kind, value, fields, name)
        if dataclasses.is_dataclass(kind):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind) if hasattr(value, f.name)}
            return self._encode_fields("dataclass", kind, value, fields, name)
        importlib.import_module("ckptengine.state.scalars")  # loads torch, which values of a conversion do without
        encode = ENCODERS.get(kind)
        if encode is not None:
            return encode(self, value, name)
        raise UnsupportedValue(
            f"{where(name)} is a {kind.__module__}.{kind.__qualname__}, which has no typed encoding (nothing is "
            f"pickled); convert it to plain values, give it state_dict and load_state_dict, or register a codec: "
            f"ckptengine.register({kind.__qualname__}, encode=..., decode=...)"
        )

    def _encode_registered(self, codec: registry.Codec, value: object, name: str) -> Json:
        try:
            inner = codec.encode(value)
        except CheckpointError:
            raise
        except Exception as error:
            raise UnsupportedValue(f"{where(name)}: the codec of {codec.name} failed to encode: {error!r}") from error
        self.enter(value, name)
        try:
            return {"$": "registered", "type": codec.name, "value": self.plain(inner, name)}
        finally:
            self.exit(value)

    def _encode_fields(self, tag: str, kind: type, value: object, fields: dict[str, object], name: str) -> Json:
        stored = registry.stored_name(kind)
        self.types[stored] = kind
        self.enter(value, name)
        try:
            encoded: Json = {k: self.encode(part, names.join(name, names.escape(k))) for k, part in fields.items()}
        finally:
            self.exit(value)
        return {"$": tag, "type": stored, "fields": encoded}


def where(name: str) -> str:
    """A leaf as error messages call it."""
    return f"state leaf {name!r}" if name else "the state"


def dumps(data: Json) -> str:
    """Compact, deterministic JSON text; ASCII only, so that it is the same under every locale."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def b64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _identity(_: Encoder, value: Any, name: str) -> Json:
    return value  # type: ignore[no-any-return]


def _int(_: Encoder, value: int, name: str) -> Json:
    return value if -_INT_LIMIT < value < _INT_LIMIT else {"$": "int", "v": hex(value)}


def _float(_: Encoder, value: float, name: str) -> Json:
    return value if math.isfinite(value) else {"$": "float", "v": struct.pack("<d", value).hex()}


def _complex(_: Encoder, value: complex, name: str) -> Json:
    return {"$": "complex", "v": struct.pack("<dd", value.real, value.imag).hex()}


def _str(_: Encoder, value: str, name: str) -> Json:
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: JSON text could not be written as UTF-8
        return {"$": "str", "v": b64(value.encode("utf-8", "surrogatepass"))}
    return value


def _bytes(_: Encoder, value: bytes, name: str) -> Json:
    return {"$": "bytes", "v": b64(value)}


def _bytearray(_: Encoder, value: bytearray, name: str) -> Json:
    return {"$": "bytearray", "v": b64(value)}


def _sequence(encoder: Encoder, value: Any, name: str) -> list[Json]:
    encoder.enter(value, name)
    try:
        return [encoder.encode(part, names.join(name, str(index))) for index, part in enumerate(value)]
    finally:
        encoder.exit(value)


def _tuple(encoder: Encoder, value: tuple[Any, ...], name: str) -> Json:
    return {"$": "tuple", "v": _sequence(encoder, value, name)}


def _deque(encoder: Encoder, value: deque[Any], name: str) -> Json:
    return {"$": "deque", "v": _sequence(encoder, value, name), "maxlen": value.maxlen}


def _set(encoder: Encoder, value: set[Any] | frozenset[Any], name: str) -> Json:
    # sorted by text, because the order of a set differs between processes and replicas must encode alike
    members = sorted((encoder.plain(member, f"{name} (a member)") for member in value), key=dumps)
    return {"$": type(value).__name__, "v": members}


def _keys_are_simple(value: dict[Any, Any]) -> bool:
    last = ""
    for key in value:
        if type(key) is not str or key < last or key[:1] == "$" or not key.isascii():
            return False
        last = key
    return True


def _items(encoder: Encoder, value: dict[Any, Any], name: str) -> Json:
    return items_of(encoder, value, name) if encoder.mapping is None else encoder.mapping(value, name)


def items_of(encoder: Encoder, value: dict[Any, Any], name: str, encode: LeafHook | None = None) -> Json:
    """The shared form of mappings: a plain object where sorting its keys changes nothing, else a list of pairs.

    ``encode``: of the values, where all are leaves.
    """
    encode = encode or encoder.encode
    encoder.enter(value, name)
    try:
        if _keys_are_simple(value):
            prefix, escape = f"{name}." if name else "", names.escape
            return {key: encode(part, prefix + escape(key)) for key, part in value.items()}
        pairs: list[Json] = []
        for key, part in value.items():
            if type(key) is str:
                pairs.append([_str(encoder, key, name), encode(part, names.join(name, names.escape(key)))])
                continue
            component = encoder.key_component(key, name)
            pairs.append([encoder.plain(key, f"{name} (a key)"), encode(part, names.join(name, component))])
        return pairs
    finally:
        encoder.exit(value)


def _dict(encoder: Encoder, value: dict[Any, Any], name: str) -> Json:
    items = _items(encoder, value, name)
    return items if isinstance(items, dict) else {"$": "dict", "items": items}


def _tagged_dict(encoder: Encoder, value: dict[Any, Any], name: str) -> Json:
    return {"$": type(value).__name__, "items": _items(encoder, value, name)}


def _ordered_dict(encoder: Encoder, value: OrderedDict[Any, Any], name: str) -> Json:
    """With the versions that torch hangs on a module's state dict, by which older ones are read."""
    node: dict[str, Json] = {"$": "OrderedDict", "items": _items(encoder, value, name)}
    metadata = getattr(value, "_metadata", None)
    if metadata:
        node["metadata"] = encoder.plain(metadata, f"{name} (its _metadata)")
    return node


def _defaultdict(encoder: Encoder, value: defaultdict[Any, Any], name: str) -> Json:
    factory = value.default_factory
    stored = next((known for known, kind in FACTORIES.items() if kind is factory), None)
    if factory is not None and stored is None:
        raise UnsupportedValue(
            f"{where(name)} is a defaultdict whose factory {factory!r} has no name; use one of {', '.join(FACTORIES)}, "
            f"or save dict(...) of it"
        )
    return {"$": "defaultdict", "factory": stored, "items": _items(encoder, value, name)}


def _range(encoder: Encoder, value: range, name: str) -> Json:
    return {"$": "range", "v": [_int(encoder, part, name) for part in (value.start, value.stop, value.step)]}


def _slice(encoder: Encoder, value: slice, name: str) -> Json:
    return {"$": "slice", "v": [encoder.plain(part, name) for part in (value.start, value.stop, value.step)]}


def _list(encoder: Encoder, value: list[Any], name: str) -> Json:
    return _sequence(encoder, value, name)


ENCODERS |= {
    type(None): _identity, bool: _identity, int: _int, float: _float, complex: _complex, str: _str, bytes: _bytes,
    bytearray: _bytearray, list: _list, tuple: _tuple, deque: _deque, set: _set, frozenset: _set, dict: _dict,
    OrderedDict: _ordered_dict, Counter: _tagged_dict, defaultdict: _defaultdict, range: _range, slice: _slice,
}  # fmt: skip


def encode(value: object, name: str = "") -> Json:
    """`Encoder.encode` for a value without tensors."""
    return Encoder().encode(value, name)
