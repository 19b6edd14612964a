"""What a pattern captured from a name, ready to fill the templates of renames."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptengine.errors import RuleError
from ckptengine.sources.rules.language import INDEXES, Rule


class Captures:
    """The groups of a matched name: ``layers.{1}.q`` by number, ``layers.{layer}.q`` by name, ``{name}`` the whole."""

    def __init__(self, match: re.Match[str]) -> None:
        self._name = match.group(0)
        self._groups = {str(number): text or "" for number, text in enumerate(match.groups(), 1)}
        self._groups |= {key: text or "" for key, text in match.groupdict().items()}

    def fill(self, template: str, rule: Rule, at: Sequence[int] = ()) -> str:
        groups = {**self._groups, "name": self._groups.get("name", self._name)}
        groups |= {name: str(number) for name, number in zip(INDEXES, at, strict=False)}
        made, rest = "", template
        while rest:
            before, brace, rest = rest.partition("{")
            made += before
            if not brace:
                break
            key, closed, rest = rest.partition("}")
            if not closed or key not in groups:
                raise RuleError(f"{rule.where}: {{{key}}} in {template!r} is not a group of {rule.match.pattern!r}")
            made += groups[key]
        return made

    def number(self, group: str, rule: Rule) -> int:
        text = self._groups.get(group, "")
        if not text.isascii() or not text.isdigit() or len(text) > 9:
            raise RuleError(f"{rule.where}: group {group!r} of {self._name!r} is {text!r}, not the number of a layer")
        return int(text)
