"""Checked access to untrusted JSON values: the type and range needed, or a `LayoutError` that names the field."""

from __future__ import annotations

from typing import Any

from ckptengine.errors import LayoutError

MAX_INTEGER = (1 << 63) - 1


def member(document: object, key: str, what: str) -> Any:
    """``document[key]`` of an object that must have it."""
    if not isinstance(document, dict):
        raise LayoutError(f"{what}: expected an object, found {document!r:.60}")
    if key not in document:
        raise LayoutError(f"{what}: field {key!r} is missing")
    return document[key]


def integer(value: object, what: str, *, least: int = 0, most: int = MAX_INTEGER) -> int:
    """An integer within bounds; booleans are not integers here."""
    if type(value) is not int or not least <= value <= most:
        raise LayoutError(f"{what}: expected an integer from {least} to {most}, found {value!r:.60}")
    return value


def integers(value: object, what: str, *, least: int = 0, most: int = MAX_INTEGER) -> tuple[int, ...]:
    """A list of integers within bounds."""
    return tuple(integer(item, what, least=least, most=most) for item in items(value, what))


def items(value: object, what: str) -> list[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        raise LayoutError(f"{what}: expected a list, found {value!r:.60}")
    return value


def texts(value: object, what: str) -> tuple[str, ...]:
    """A list of strings."""
    found = items(value, what)
    for item in found:
        if not isinstance(item, str):
            raise LayoutError(f"{what}: expected a string, found {item!r:.60}")
    return tuple(found)
