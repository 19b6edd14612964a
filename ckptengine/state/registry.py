"""Types that users add to the typed encoding, and the rule by which a stored type name becomes a type.

Reading never imports anything.  A name resolves to a type that was registered in this process, or that was seen in the
live state being restored into; otherwise the value is read as an inert `Opaque`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptengine.errors import UnusableRequest


@dataclass(frozen=True, slots=True)
class Codec:
    """How values of exactly ``type`` are stored: ``encode`` gives a supported value, ``decode`` takes it back."""

    type: type
    name: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]


@dataclass(frozen=True)
class Opaque:
    """A stored value whose type is not known here: its name and its decoded parts, and nothing else.

    ``fields`` is a dict for dataclasses, namedtuples and Enums, and the encoded value for registered types.
    """

    type_name: str
    fields: object = field(default=None)

    def __hash__(self) -> int:
        return hash(self.type_name)


_CODECS: dict[type, Codec] = {}
_CODECS_BY_NAME: dict[str, Codec] = {}
_TYPES: dict[str, type] = {}


def type_name(kind: type) -> str:
    """The name a type is stored under unless it was registered with another."""
    return f"{kind.__module__}:{kind.__qualname__}"


def is_structured(kind: type) -> bool:
    """Whether values of ``kind`` are stored field by field without a codec: dataclass, namedtuple or Enum."""
    if issubclass(kind, enum.Enum) or dataclasses.is_dataclass(kind):
        return True
    return issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)


def register(
    kind: type,
    *,
    encode: Callable[[Any], object] | None = None,
    decode: Callable[[Any], object] | None = None,
    name: str | None = None,
) -> None:
    """Let values of exactly ``kind`` be saved and read.

    With ``encode`` and ``decode``: ``encode(value)`` returns any supported value (tensors excluded) and
    ``decode(that)`` the value.  Without: ``kind`` must be a dataclass, namedtuple or Enum, and becomes readable where
    no live value shows its type.  ``name`` is what is stored (default: module and qualified name); choose one that
    survives a move of the class.  Raises `UnusableRequest` for a clash or half a pair.
    """
    stored = name or type_name(kind)
    if (encode is None) != (decode is None):
        raise UnusableRequest(f"register({kind.__qualname__}): give both encode and decode, or neither")
    clash = _CODECS_BY_NAME.get(stored)
    taken = clash.type if clash is not None else _TYPES.get(stored)
    if taken is not None and taken is not kind and type_name(taken) != type_name(kind):
        raise UnusableRequest(f"register({kind.__qualname__}): the name {stored!r} belongs to {taken.__qualname__}")
    if encode is not None and decode is not None:
        codec = Codec(kind, stored, encode, decode)
        _CODECS[kind] = codec
        _CODECS_BY_NAME[stored] = codec
    elif is_structured(kind):
        _TYPES[stored] = kind
    else:
        raise UnusableRequest(
            f"register({kind.__qualname__}): only dataclasses, namedtuples and Enums need no encode= and decode="
        )


def codec_of(kind: type) -> Codec | None:
    """The codec registered for exactly ``kind``."""
    return _CODECS.get(kind)


def codec_named(name: str) -> Codec | None:
    """The codec registered under a stored name."""
    return _CODECS_BY_NAME.get(name)


def stored_name(kind: type) -> str:
    """The name under which a structured ``kind`` is stored."""
    for name, known in _TYPES.items():
        if known is kind:
            return name
    return type_name(kind)


def resolve(name: str, seen: Mapping[str, type]) -> type | None:
    """The type stored as ``name``: registered, or ``seen`` in the live state; None when it is neither."""
    return _TYPES.get(name) or seen.get(name)
