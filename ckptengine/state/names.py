r"""Canonical names: the path of a leaf in the state, joined with dots.

A string key stands for itself with ``.`` written ``\.`` and ``\`` written ``\\``; a list index and the attribute of a
module are plain too, because no container mixes them with string keys.  Everything else is marked, so that keys of
different types never share a name:

==================  =====================================================
key                 component
==================  =====================================================
``"a"``             ``a``
``"a.b"``           ``a\.b``
``""``              ``\e``
``0`` (dict key)    ``\#0``
any other key       ``\=`` and its encoding as JSON text, escaped
rank 3's own leaf   ``\@3`` as the last component
lone surrogate      ``\uD800``
==================  =====================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptengine.errors import UnreadableFormat

_SPECIAL = re.compile("[\\\\.\ud800-\udfff]")
_TOKEN = re.compile(r"\\(?:u([0-9A-F]{4})|([\\.e#=@]))|([^\\.]+)|(\.)")


@dataclass(frozen=True, slots=True)
class TypedKey:
    """A dictionary key that is neither a string nor an integer: the JSON text of its encoding."""

    text: str


@dataclass(frozen=True, slots=True)
class RankMark:
    """The last component of a leaf that belongs to one rank alone."""

    rank: int


Component = str | int | TypedKey | RankMark


def _escape_match(match: re.Match[str]) -> str:
    char = match.group()
    return "\\" + char if char in "\\." else f"\\u{ord(char):04X}"


def escape(key: Component) -> str:
    """One component of a name; the inverse is `split`."""
    if type(key) is str:
        if key.isascii() and "." not in key and "\\" not in key:
            return key or "\\e"
        if key.isascii():
            return key.replace("\\", "\\\\").replace(".", "\\.")
        return _SPECIAL.sub(_escape_match, key)
    if isinstance(key, TypedKey):
        return "\\=" + _SPECIAL.sub(_escape_match, key.text)
    if isinstance(key, RankMark):
        return f"\\@{key.rank}"
    return f"\\#{int(key)}"


def join(prefix: str, component: str) -> str:
    """``prefix`` and an escaped ``component``; an empty prefix is the root of the state."""
    return f"{prefix}.{component}" if prefix else component


def make(*path: Component) -> str:
    """The canonical name of ``path``."""
    return ".".join(escape(key) for key in path)


def split(name: str) -> tuple[Component, ...]:
    """The components of ``name``; list indices come back as strings.  `UnreadableFormat` for a malformed name."""
    if not name:
        return ()
    parts: list[tuple[str, str]] = []
    mark, text, position = "", "", 0
    for token in _TOKEN.finditer(name):
        if token.start() != position:
            raise UnreadableFormat(f"malformed name {name!r} at character {position}")
        position = token.end()
        surrogate, escaped, plain, dot = token.groups()
        if dot:
            parts.append((mark, text))
            mark, text = "", ""
        elif surrogate:
            text += chr(int(surrogate, 16))
        elif escaped and escaped in "e#=@":
            if mark or text:
                raise UnreadableFormat(f"malformed name {name!r}: \\{escaped} inside a component")
            mark = escaped
        else:
            text += escaped or plain
    if position != len(name):
        raise UnreadableFormat(f"malformed name {name!r} at character {position}")
    parts.append((mark, text))
    return tuple(_component(name, mark, text) for mark, text in parts)


def _component(name: str, mark: str, text: str) -> Component:
    if mark == "":
        if not text:
            raise UnreadableFormat(f"malformed name {name!r}: empty component")
        return text
    if mark == "e" and not text:
        return ""
    if mark == "=":
        return TypedKey(text)
    if mark in "#@" and re.fullmatch(r"-?[0-9]{1,4000}" if mark == "#" else r"[0-9]{1,9}", text):
        return int(text) if mark == "#" else RankMark(int(text))
    raise UnreadableFormat(f"malformed name {name!r}: bad component \\{mark}{text}")


def plain(name: str) -> str:
    """``name`` as other formats have it: keys joined with dots, nothing escaped.

    A name that is malformed, or belongs to one rank alone, stays as it is.
    """
    if "\\" not in name:
        return name
    try:
        path = split(name)
    except UnreadableFormat:
        return name
    if any(isinstance(part, RankMark) for part in path):
        return name
    return ".".join(part.text if isinstance(part, TypedKey) else str(part) for part in path)
