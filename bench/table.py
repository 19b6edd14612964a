"""Tables: a title, columns, rows of text, and notes; rendered for a terminal or for Markdown.  Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .statistics import Summary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What is shown of one workload."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal: columns aligned, the first to the left, the others to the right."""
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        rendered = [self.title, ""]
        for number, line in enumerate(lines):
            first, *others = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            shifted = [cell.rstrip().rjust(len(cell)) for cell in others]
            rendered.append("  ".join([first, *shifted]).rstrip())
            if number == 0:
                rendered.append("  ".join("-" * width for width in widths))
        rendered += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(rendered) + "\n"

    def markdown(self) -> str:
        """For a page."""
        head = "| " + " | ".join(self.columns) + " |"
        rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(self.columns))) + "|"
        body = ["| " + " | ".join(row) + " |" for row in self.rows]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", head, rule, *body, *notes]) + "\n"


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def spread(summary: Summary | None, factor: float = 1.0) -> str:
    """Median [low, high] in the unit that `factor` leads to; a dash where nothing was measured."""
    if summary is None:
        return "-"
    scaled = summary.scaled(factor)
    if scaled.count == 1:
        return number(scaled.median)
    return f"{number(scaled.median)} [{number(scaled.low)}, {number(scaled.high)}]"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{number(value)}x"


def percent(value: float | None) -> str:
    """A share."""
    return "-" if value is None else f"{value * 100:.0f} %"


def size(size_bytes: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size_bytes) < 1024:
            return f"{number(size_bytes)} {unit}"
        size_bytes /= 1024
    return f"{number(size_bytes)} GiB"


def verdict(checks: Sequence[str]) -> str:
    """All checks of an engine in one word, or the first that is not good."""
    bad = [check for check in checks if check != "ok"]
    if not checks:
        return "-"
    if not bad:
        return "equal"
    return "-" if bad[0].startswith("not ") else f"{len(bad)} of {len(checks)}: {bad[0]}"
