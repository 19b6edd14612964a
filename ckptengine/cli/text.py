"""Plain-text tables and sizes for the commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptengine.errors import UnusableRequest

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size_text(nbytes: float) -> str:
    """A size for people: ``1.4 GiB``."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def number_text(value: object) -> str:
    """A metric for people: at most six digits of a fraction."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def counted(count: int, what: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def parse_size(text: str) -> int:
    """Bytes from ``1GiB``, ``256 MiB``, ``500MB`` or ``1048576``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UnusableRequest(f"{text!r} is not a size; write it like 1GiB, 256MiB or 1048576")
    base = 1024 if match[3] or not match[2] else 1000
    return int(float(match[1]) * base ** " KMGTP".index(match[2].upper() or " "))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, the first row being the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
