"""The rule language as data: what one rule and one rule file say.  Pure.

See ``docs/rules.md`` for the meaning; `ckptengine.sources.rules.parse` reads it from TOML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptengine.errors import RuleError
from ckptengine.sources.rules.expression import Expression, evaluate

INDEXES = ("index", "index2")
"""What the indices of unstacked dimensions are called in templates."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the whole tensor, bit for bit the same."""


@dataclass(frozen=True, slots=True)
class Averaged:
    """Every rank holds a whole tensor of its own; the tensor is their mean."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """The ranks' pieces follow one another along ``dim``.

    With ``parts`` the dimension is fused of parts of these relative widths, each of them cut over the ranks by itself.
    With ``widths`` the pieces are unequal: for each part the number of indices on each rank.
    """

    dim: int
    parts: tuple[Expression, ...] = (1,)
    widths: tuple[tuple[int, ...], ...] | None = None


Layout = Replicated | Averaged | Sharded


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a fused dimension and the name it gets as a tensor of its own."""

    rename: str
    width: Expression


@dataclass(frozen=True, slots=True)
class Split:
    """A fused dimension taken apart: ``groups`` times one run of every part."""

    dim: int
    parts: tuple[Part, ...]
    groups: Expression = 1


@dataclass(frozen=True, slots=True)
class Join:
    """The inverse of `Split`: this tensor is number ``part`` of the parts of the tensor it is renamed to."""

    dim: int
    part: int
    widths: tuple[Expression, ...]
    groups: Expression = 1


@dataclass(frozen=True, slots=True)
class Regroup:
    """A fused dimension in another order: from ``before`` groups of one run of every part to ``after`` groups."""

    dim: int
    widths: tuple[Expression, ...]
    before: Expression
    after: Expression


@dataclass(frozen=True, slots=True)
class Unpadded:
    """Only the first ``extent`` indices of ``dim`` are real; 0 keeps them all."""

    dim: int
    extent: Expression


@dataclass(frozen=True, slots=True)
class View:
    """How a whole tensor is shown.  The steps happen in the order of the fields.

    ``stack`` are groups of the pattern, the outermost new dimension first.
    """

    unstack: tuple[int, ...] = ()
    unpadded: Unpadded | None = None
    regroup: Regroup | None = None
    split: Split | None = None
    transpose: tuple[int, ...] | None = None
    rename: str | None = None
    join: Join | None = None
    stack: tuple[str, ...] = ()
    tied: str | None = None
    drop: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One ``[[rule]]``: ``layout`` and ``expert`` say what ranks' pieces mean, ``view`` how the whole is shown.

    ``pieces`` is the shape that the elements of each rank's piece really have, in their order; -1 is what is left.
    """

    match: re.Pattern[str]
    where: str
    optional: bool
    priority: int
    layout: Layout | None = None
    expert: int | None = None
    view: View | None = None
    pieces: tuple[Expression, ...] | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """A name of ``[let]``: a fixed expression, or the first value found in the checkpoint's own values."""

    default: Expression | None
    paths: tuple[tuple[str, ...], ...] = ()


Group = re.Pattern[str] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """One rule file with everything that it extends; ``texts`` is all that was read for it.

    ``groups``: which weights each group of an optimizer has that numbers its parameters, by a pattern or by their names
    in order; none where nothing is said.
    """

    name: str
    rules: tuple[Rule, ...]
    variables: Mapping[str, Variable] = field(default_factory=dict)
    texts: tuple[str, ...] = field(repr=False, default=())
    groups: tuple[Group, ...] = ()
    _layouts: tuple[Rule, ...] = field(init=False, repr=False, default=())
    _views: tuple[Rule, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        layouts = tuple(rule for rule in self.rules if rule.layout is not None or rule.expert is not None)
        object.__setattr__(self, "_layouts", layouts)
        object.__setattr__(self, "_views", tuple(rule for rule in self.rules if rule.view is not None))

    def layout_rule(self, name: str) -> tuple[Rule, re.Match[str]] | None:
        """The rule that says how pieces of the parameter ``name`` make it whole."""
        return self._claim(name, self._layouts)

    def view_rule(self, name: str) -> tuple[Rule, re.Match[str]] | None:
        """The rule that says how the parameter ``name`` is shown."""
        return self._claim(name, self._views)

    def _claim(self, name: str, rules: tuple[Rule, ...]) -> tuple[Rule, re.Match[str]] | None:
        claims = [(rule, match) for rule in rules if (match := rule.match.fullmatch(name)) is not None]
        if not claims:
            return None
        best = min(rule.priority for rule, _ in claims)
        claims = [(rule, match) for rule, match in claims if rule.priority == best]
        if len(claims) > 1:
            both = " and ".join(f"{rule.where} ({rule.match.pattern!r})" for rule, _ in claims[:2])
            raise RuleError(f"{both} both claim {name!r}; narrow one of the two patterns")
        return claims[0]

    def unmatched(self, names: list[str]) -> list[Rule]:
        """Rules that must match something and match none of ``names``."""
        needed = [rule for rule in self.rules if not rule.optional]
        return [rule for rule in needed if not any(rule.match.fullmatch(name) for name in names)]

    def check(self, names: list[str]) -> None:
        """`RuleError` for a rule that matches none of the parameters ``names`` though it is not optional."""
        missing = self.unmatched(names)
        if missing:
            listed = "; ".join(f"{rule.where}: {rule.match.pattern!r}" for rule in missing[:5])
            example = f" (the checkpoint has, for example, {names[0]!r})" if names else ""
            raise RuleError(
                f"{len(missing)} rule(s) of {self.name} match no tensor{example}: {listed}. "
                "Patterns match whole names without model. or optim.; say optional = true for a rule that may not match"
            )

    def value(self, expression: Expression, values: object, where: str) -> int:
        """The value of an expression, its names looked up in ``[let]`` and in the checkpoint's ``values``."""
        return evaluate(expression, _Lookup(self, values, where), where)


class _Lookup:
    """The numbers of ``[let]`` for one expression, each found once."""

    def __init__(self, rules: Rules, values: object, where: str) -> None:
        self._rules = rules
        self._values = values
        self._where = where
        self._found: dict[str, int | None] = {}

    def __call__(self, name: str) -> int:
        if name not in self._found:
            self._found[name] = None
            self._found[name] = self._look_up(name)
        found = self._found[name]
        if found is None:
            raise RuleError(f"{self._where}: {name!r} of [let] refers to itself in a circle")
        return found

    def _look_up(self, name: str) -> int:
        variable = self._rules.variables.get(name)
        if variable is None:
            known = ", ".join(sorted(self._rules.variables)) or "none"
            raise RuleError(f"{self._where}: {name!r} is not a name of [let] (known: {known})")
        for path in variable.paths:
            found = look_up(self._values, path)
            if isinstance(found, int):  # true and false count as 1 and 0
                return int(found)
        if variable.default is None:
            as_argument = "" if self._rules.name.endswith(".toml") else f"as {self._rules.name}:{name}=<number> or "
            raise RuleError(
                f"{self._where}: the checkpoint does not say {name!r}; give it, {as_argument}as {name} = <number> "
                "under [let]"
            )
        return evaluate(variable.default, self, self._where)


def look_up(values: object, path: tuple[str, ...]) -> object:
    """The value at ``path`` of nested dictionaries, or None."""
    for key in path:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values
