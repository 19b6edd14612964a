"""Which names a restore touches: prefixes and globs."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.errors import UnusableRequest


@dataclass(frozen=True, slots=True)
class Selection:
    """``patterns`` None selects everything.

    A pattern without ``*``, ``?`` and ``[`` selects that name and all names below it; a glob selects the names that it
    matches (``*`` crosses dots) and all below them.
    """

    patterns: tuple[str, ...] | None = None

    @classmethod
    def of(cls, patterns: Sequence[str] | None) -> Selection:
        if patterns is None:
            return cls()
        if isinstance(patterns, str) or not all(isinstance(one, str) and one for one in patterns) or not patterns:
            raise UnusableRequest(f"names= must be a list of names, prefixes or globs, not {patterns!r}")
        return cls(tuple(patterns))

    @property
    def everything(self) -> bool:
        return self.patterns is None

    def covers(self, name: str) -> bool:
        """Whether ``name`` itself, with all below it, is selected."""
        return self.patterns is None or any(_covers(pattern, name) for pattern in self.patterns)

    def touches(self, name: str) -> bool:
        """Whether ``name`` or something below it may be selected."""
        if self.patterns is None or not name or self.covers(name):
            return True
        return any(_is_glob(pattern) or pattern.startswith(f"{name}.") for pattern in self.patterns)


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _covers(pattern: str, name: str) -> bool:
    if name == pattern or name.startswith(f"{pattern}."):
        return True
    if not _is_glob(pattern):
        return False
    while name:
        if fnmatch.fnmatchcase(name, pattern):
            return True
        name = name.rpartition(".")[0]
    return False
