"""Reading the typed encoding: bounded, and nothing that was read is imported or run."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import importlib
import json
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ckptengine.errors import CheckpointError, UnreadableFormat
from ckptengine.state import registry
from ckptengine.state.encoding import FACTORIES, MAX_DEPTH, Json
from ckptengine.state.registry import Opaque


@dataclasses.dataclass(frozen=True, slots=True)
class TensorRef:
    """What a tensor decodes to where nobody says otherwise: the name it is stored under."""

    name: str


class DecodeHook(Protocol):
    """Decodes a node that is not a plain value (tensor, module, optimizer, object, ...)."""

    def __call__(self, node: dict[str, Json], decoder: Decoder) -> object: ...


Decode = Callable[["Decoder", dict[str, Json]], object]
DECODERS: dict[str, Decode] = {}
"""How each tag is read; those of numpy, torch and more of the standard library come with `ckptengine.state.scalars`."""
_OF_LIVE_STATE = frozenset({"tensor", "module", "optimizer", "object", "per_rank"})
"""Tags of what is no plain value: the hook's."""

_BAD_DATA = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError, struct.error)
_PARTS_DEPTH = 2 * MAX_DEPTH  # a tagged container uses two levels


class Decoder:
    """Reads encoded data.  ``types`` are the structured types of the live state, by stored name.

    Names of types that could not be resolved are collected in ``unknown_types``.
    """

    def __init__(self, *, types: Mapping[str, type] | None = None, leaf: DecodeHook | None = None) -> None:
        self.types = types or {}
        self.leaf = leaf
        self.unknown_types: set[str] = set()
        self._depth = 0

    def decode(self, data: Json) -> object:
        """The value of ``data``; `UnreadableFormat` for anything that `Encoder` would not have written."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        self._depth += 1
        try:
            if self._depth > _PARTS_DEPTH:
                raise malformed(f"nested more than {_PARTS_DEPTH} levels deep")
            if isinstance(data, list):
                return [self.decode(part) for part in data]
            if isinstance(data, dict):
                return self._decode_object(data)
        finally:
            self._depth -= 1
        raise malformed(f"a {type(data).__name__} is no JSON value")

    def _decode_object(self, node: dict[str, Json]) -> object:
        if "$" not in node:
            return {checked(key, str): self.decode(part) for key, part in node.items()}
        tag = node["$"]
        decode = _decoder_of(tag) if isinstance(tag, str) else None
        try:
            if decode is not None:
                return decode(self, node)
            if self.leaf is not None:
                return self.leaf(node, self)
            if tag == "tensor":
                return TensorRef(checked(node["name"], str))
        except CheckpointError:
            raise
        except _BAD_DATA as error:
            raise malformed(f"a value tagged {tag!r}: {error!r}") from error
        raise malformed(f"unknown tag {tag!r}; written by a newer version?")

    def sequence(self, parts: Json) -> list[object]:
        return [self.decode(part) for part in checked(parts, list)]

    def items(self, parts: Json) -> list[tuple[Any, object]]:
        """Key and value pairs of either form of a mapping; repeated keys are refused."""
        if isinstance(parts, dict):
            return [(key, self.decode(part)) for key, part in parts.items()]
        pairs: list[tuple[Any, object]] = []
        for pair in checked(parts, list):
            key, part = checked(pair, list)
            pairs.append((self.decode(key), self.decode(part)))
        if len({key for key, _ in pairs}) != len(pairs):
            raise malformed("a mapping with a repeated key")
        return pairs


def malformed(what: str) -> UnreadableFormat:
    """The error for data that no writer of this format produces."""
    return UnreadableFormat(f"stored value is malformed: {what}; the checkpoint is damaged or not ours, try another")


def checked(value: Any, kind: type) -> Any:
    """``value`` if it is exactly a ``kind``, else `UnreadableFormat`."""
    if type(value) is not kind:
        raise malformed(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def unb64(text: Json) -> bytes:
    """The bytes of a base64 string."""
    try:
        return base64.b64decode(checked(text, str), validate=True)
    except (binascii.Error, ValueError) as error:
        raise malformed(f"bad base64: {error}") from error


def loads(text: str | bytes) -> Json:
    """JSON text to data; `UnreadableFormat` for anything else, however deep or large."""
    try:
        data: Json = json.loads(text, parse_constant=_no_constant)
        return data
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(f"not JSON: {str(error)[:200]}") from error


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _ordered_dict(decoder: Decoder, node: dict[str, Json]) -> object:
    made = OrderedDict(decoder.items(node["items"]))
    if "metadata" in node:
        made._metadata = decoder.decode(node["metadata"])  # type: ignore[attr-defined]
    return made


def _enum(decoder: Decoder, node: dict[str, Json]) -> object:
    stored, member = checked(node["type"], str), node["name"]
    value = decoder.decode(node["value"])
    kind = registry.resolve(stored, decoder.types)
    if kind is None or not issubclass(kind, enum.Enum):
        decoder.unknown_types.add(stored)
        return Opaque(stored, {"name": member, "value": value})
    known = kind.__members__.get(member) if isinstance(member, str) else None
    if known is not None and known.value == value:
        return known
    for candidate in kind:  # a renamed member keeps its value
        if candidate.value == value:
            return candidate
    if issubclass(kind, enum.Flag) and type(value) is int:  # a combination of flags has no single name
        return kind(value)
    raise malformed(f"{stored} has no member {member!r} with value {value!r}; the Enum changed since the save")


def _namedtuple(decoder: Decoder, node: dict[str, Json]) -> object:
    stored, fields = checked(node["type"], str), decoder.decode(checked(node["fields"], dict))
    kind = registry.resolve(stored, decoder.types)
    if kind is None or not isinstance(fields, dict):
        decoder.unknown_types.add(stored)
        return Opaque(stored, fields)
    names = getattr(kind, "_fields", None)
    if names is None or set(names) != set(fields):
        raise malformed(f"{stored} now has the fields {names}, it was stored with {tuple(fields)}")
    return tuple.__new__(kind, [fields[name] for name in names])


def _dataclass(decoder: Decoder, node: dict[str, Json]) -> object:
    stored, fields = checked(node["type"], str), decoder.decode(checked(node["fields"], dict))
    kind = registry.resolve(stored, decoder.types)
    if kind is None or not dataclasses.is_dataclass(kind) or not isinstance(fields, dict):
        decoder.unknown_types.add(stored)
        return Opaque(stored, fields)
    value = object.__new__(kind)
    set_fields(value, fields, stored)
    return value


def set_fields(value: object, fields: Mapping[str, object], stored: str) -> None:
    """Give a dataclass instance its fields without running its ``__init__``, ``__post_init__`` or ``__setattr__``."""
    declared = {field.name for field in dataclasses.fields(value)}  # type: ignore[arg-type]
    if not set(fields) <= declared:
        raise malformed(f"{stored} no longer has the fields {sorted(set(fields) - declared)}")
    for name, part in fields.items():
        object.__setattr__(value, name, part)


def _registered(decoder: Decoder, node: dict[str, Json]) -> object:
    stored, inner = checked(node["type"], str), decoder.decode(node["value"])
    codec = registry.codec_named(stored)
    if codec is None:
        decoder.unknown_types.add(stored)
        return Opaque(stored, inner)
    try:
        return codec.decode(inner)
    except CheckpointError:
        raise
    except Exception as error:
        raise UnreadableFormat(f"the codec registered for {stored} failed to decode: {error!r}") from error


def _defaultdict(decoder: Decoder, node: dict[str, Json]) -> object:
    factory = node["factory"]
    return defaultdict(None if factory is None else FACTORIES[checked(factory, str)], decoder.items(node["items"]))


def _complex(_: Decoder, node: dict[str, Json]) -> object:
    real, imaginary = struct.unpack("<dd", bytes.fromhex(checked(node["v"], str)))
    return complex(real, imaginary)


def _int(_: Decoder, node: dict[str, Json]) -> object:
    return int(checked(node["v"], str), 16)


def _float(_: Decoder, node: dict[str, Json]) -> object:
    return struct.unpack("<d", bytes.fromhex(checked(node["v"], str)))[0]


def _slice(decoder: Decoder, node: dict[str, Json]) -> object:
    start, stop, step = decoder.sequence(node["v"])
    return slice(start, stop, step)


def _range(decoder: Decoder, node: dict[str, Json]) -> object:
    start, stop, step = decoder.sequence(node["v"])
    return range(checked(start, int), checked(stop, int), checked(step, int))


def _deque(decoder: Decoder, node: dict[str, Json]) -> object:
    maxlen = node["maxlen"]
    return deque(decoder.sequence(node["v"]), None if maxlen is None else checked(maxlen, int))


def _decoder_of(tag: str) -> Decode | None:
    """How ``tag`` is read; loads torch where that takes it, which a conversion of plain values starts without."""
    if tag not in DECODERS and tag not in _OF_LIVE_STATE:
        importlib.import_module("ckptengine.state.scalars")
    return DECODERS.get(tag)


DECODERS |= {
    "int": _int,
    "float": _float,
    "complex": _complex,
    "str": lambda d, n: unb64(n["v"]).decode("utf-8", "surrogatepass"),
    "bytes": lambda d, n: unb64(n["v"]),
    "bytearray": lambda d, n: bytearray(unb64(n["v"])),
    "tuple": lambda d, n: tuple(d.sequence(n["v"])),
    "deque": _deque,
    "set": lambda d, n: set(d.sequence(n["v"])),
    "frozenset": lambda d, n: frozenset(d.sequence(n["v"])),
    "dict": lambda d, n: dict(d.items(n["items"])),
    "OrderedDict": _ordered_dict,
    "Counter": lambda d, n: Counter(dict(d.items(n["items"]))),
    "defaultdict": _defaultdict,
    "range": _range,
    "slice": _slice,
    "enum": _enum,
    "namedtuple": _namedtuple,
    "dataclass": _dataclass,
    "registered": _registered,
}


def decode(data: Json, types: Mapping[str, type] | None = None) -> object:
    """`Decoder.decode` for data without tensors; tensors become `TensorRef`."""
    return Decoder(types=types).decode(data)
