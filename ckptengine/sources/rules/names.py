"""Canonical names taken apart: which part of a source, which parameter, which optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MODEL = "model"


@dataclass(frozen=True, slots=True)
class Canonical:
    """``root`` . ``parameter`` . ``state``; ``state`` is "" for a weight, ``root`` "" for a name that has neither."""

    root: str
    parameter: str
    state: str

    def renamed(self, parameter: str) -> str:
        return ".".join(part for part in (self.root, parameter, self.state) if part)


class Names:
    """The canonical names of a source and the parameters among them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._weights = {name[len(MODEL) + 1 :] for name in names if name.startswith(MODEL + ".")}

    def take_apart(self, name: str) -> Canonical:
        """``model.<parameter>`` is a weight; ``<root>.<parameter>.<state>`` a state of it; all else stands alone."""
        root, _, rest = name.partition(".")
        if root == MODEL and rest:
            return Canonical(root, rest, "")
        parameter, _, state = rest.rpartition(".")
        if parameter in self._weights:
            return Canonical(root, parameter, state)
        return Canonical("", name, "")
