"""A source shown under other names and shapes, as the view keys of rules say, without moving a byte."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptengine.errors import NotFound, RuleError
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.port import Source, Verifying
from ckptengine.sources.rules.algebra import Placed
from ckptengine.sources.rules.captures import Captures
from ckptengine.sources.rules.language import Rule, Rules, View
from ckptengine.sources.rules.named import named
from ckptengine.sources.rules.names import MODEL, Canonical, Names
from ckptengine.sources.rules.shaping import Shaping, Shown, stacked
from ckptengine.sources.wrapping import Wrapping, WrappingVerifying

_Place = tuple[tuple[int, ...], int]


@dataclass(slots=True)
class _Recipe:
    """What one shown tensor is made of: by its place on the stacked dimensions and by part (0 when not joined)."""

    pieces: dict[_Place, Shown] = field(default_factory=dict)
    gathered: bool = False


def present(source: Source, rules: Rules) -> Source:
    """``source`` as the view keys of ``rules`` show it.

    Raises `RuleError` for a rule that matches nothing, two rules that claim one tensor, two tensors that get one name,
    and parts or layers that are missing.
    """
    if rules.groups:
        source = named(source, rules.groups, rules.name)
    return _VerifyingView(source, rules) if isinstance(source, Verifying) else _View(source, rules)


@dataclass(frozen=True, slots=True)
class _Tie:
    """A name of the base source that is to be an alias of another one, and the rule that says so."""

    base: str
    canonical: Canonical
    owner: str
    rule: Rule


class _View(Wrapping):
    def __init__(self, base: Source, rules: Rules) -> None:
        super().__init__(base)
        self._rules = rules
        names = list(base.names())
        self._names = Names(names)
        self._read_values: list[object] = []
        taken = {name: self._names.take_apart(name) for name in names}
        parameters = list(dict.fromkeys(canonical.parameter for canonical in taken.values()))
        rules.check(parameters)
        claims = {parameter: rules.view_rule(parameter) for parameter in parameters}
        self._recipes: dict[str, _Recipe] = {}
        self._renamed: dict[str, list[str]] = {}
        self._aliases: dict[str, str] = {}
        self._shaping = Shaping(rules, lambda: self._values)
        self._ties: dict[str, _Tie] = {}
        for name in names:
            claim = claims[taken[name].parameter]
            if claim is None:
                self._add(name, Shown(name, taken[name]))
            else:
                self._show(name, taken[name], claim[0], Captures(claim[1]))
        for recipe_name, recipe in self._recipes.items():
            if recipe.gathered:
                self._complete(recipe_name, recipe)
        for tie in self._ties.values():
            self._tie(tie)

    # the port

    def names(self) -> Sequence[str]:
        return [*self._recipes, *self._aliases]

    def aliases(self) -> Mapping[str, str]:
        shown = dict(self._aliases)
        for alias, owner in self._base.aliases().items():
            new, target = self._only_name(alias), self._only_name(owner)
            if new is not None and target is not None and new != target and self._shown_alike(new, target):
                shown.setdefault(new, target)
        return shown

    def _shown_alike(self, name: str, other: str) -> bool:
        """Whether two names show one tensor each, and the same elements of it in the same order."""
        pair = [self._recipes.get(name), self._recipes.get(other)]
        single = [
            shown for recipe in pair if recipe is not None and not recipe.gathered for shown in recipe.pieces.values()
        ]
        return len(single) == 2 and single[0].moves == single[1].moves

    def values(self) -> object:
        return _with_groups(self._values, self._renamed)

    @property
    def _values(self) -> object:
        """The base's values, read when they are first asked for."""
        if not self._read_values:
            self._read_values.append(self._base.values())
        return self._read_values[0]

    def tensor(self, name: str) -> LogicalTensor:
        recipe = self._recipes.get(name)
        if recipe is None and name in self._aliases:
            return replace(self.tensor(self._aliases[name]), name=name)
        if recipe is None:
            raise NotFound(f"{self._base.files.root} has no tensor {name!r} under the rules {self._rules.name}")
        if not recipe.gathered:
            (shown,) = recipe.pieces.values()
            return self._one(name, shown)
        placed = self._gathered(name, recipe)
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments)

    # names

    def _show(self, name: str, canonical: Canonical, rule: Rule, captures: Captures) -> None:
        view = rule.view
        assert view is not None
        if view.drop:
            self._renamed.setdefault(canonical.parameter, [])
            return
        if view.tied is not None:
            self._ties[name] = _Tie(name, canonical, canonical.renamed(captures.fill(view.tied, rule)), rule)
            self._renamed.setdefault(canonical.parameter, [])
            return
        for at in self._indices(name, canonical, rule, view):
            for part, template in enumerate(_templates(view)):
                parameter = captures.fill(template, rule, at)
                if not parameter:
                    raise RuleError(f"{rule.where}: {name} would get an empty name")
                shown = Shown(name, canonical, rule, at, part if view.split else None)
                if canonical.state == "":
                    self._renamed.setdefault(canonical.parameter, []).append(parameter)
                if not view.stack and view.join is None:
                    self._add(canonical.renamed(parameter), shown)
                else:
                    layers = tuple(captures.number(group, rule) for group in view.stack)
                    self._add(canonical.renamed(parameter), shown, (layers, view.join.part if view.join else 0))

    def _indices(self, name: str, canonical: Canonical, rule: Rule, view: View) -> Iterable[tuple[int, ...]]:
        if not view.unstack:
            return ((),)
        source = name
        if not self._base.tensor(name).shape and canonical.state:  # a counter that all layers share
            source = f"model.{canonical.parameter}"
        shape = self._base.tensor(source).shape
        beyond = [dim for dim in view.unstack if dim >= len(shape)]
        if beyond:
            raise RuleError(f"{rule.where}: {source} has shape {list(shape)}, no dimension {beyond[0]} to unstack")
        return itertools.product(*(range(shape[dim]) for dim in view.unstack))

    def _add(self, target: str, shown: Shown, piece: _Place | None = None) -> None:
        recipe = self._recipes.setdefault(target, _Recipe())
        if recipe.pieces and (piece is None or not recipe.gathered or piece in recipe.pieces):
            other = next(iter(recipe.pieces.values())).base
            raise RuleError(f"under the rules {self._rules.name} both {other!r} and {shown.base!r} become {target!r}")
        recipe.gathered = piece is not None
        recipe.pieces[piece or ((), 0)] = shown

    def _complete(self, name: str, recipe: _Recipe) -> None:
        places = [place for place, _ in recipe.pieces]
        if len({*map(len, places)}) > 1:
            raise RuleError(f"under the rules {self._rules.name} the parts of {name} are stacked in different ways")
        extents = [1 + max(numbers) for numbers in zip(*places, strict=True)]
        parts = max(shown.part_count for shown in recipe.pieces.values())
        if len(recipe.pieces) == math.prod(extents) * parts:
            return
        needed = (_nth(number, (*extents, parts)) for number in range(len(recipe.pieces) + 1))
        *at, part = next(place for place in needed if (place[:-1], place[-1]) not in recipe.pieces)
        layer = ", ".join(map(str, at)) or "0"
        total = " x ".join(map(str, extents)) or "1"
        raise RuleError(
            f"{name} cannot be put together under the rules {self._rules.name}: layer {layer}, part "
            f"{part} is missing (layers count from 0, {total} of them; {parts} part(s) each)"
        )

    def _tie(self, tie: _Tie) -> None:
        """Make an alias; an optimizer's state of it is left out, because it is that of the owner."""
        if tie.base in self._recipes:
            other = next(iter(self._recipes[tie.base].pieces.values())).base
            raise RuleError(f"under the rules {self._rules.name} both {other!r} and {tie.base!r} become {tie.base!r}")
        owner, passed = tie.owner, {tie.base}
        while owner in self._ties and owner not in passed:
            passed.add(owner)
            owner = self._ties[owner].owner
        if owner in passed:
            raise RuleError(f"{tie.rule.where}: {', '.join(sorted(passed))} are tied to each other; one has to be kept")
        recipe = self._recipes.get(owner)
        if recipe is None:
            near = difflib.get_close_matches(owner, self._recipes, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RuleError(
                f"{tie.rule.where}: {tie.base} is tied to {owner!r}, which is not there under these rules{hint}"
            )
        if tie.canonical.state:
            return
        first = next(iter(recipe.pieces.values()))
        have, kept = self._base.tensor(tie.base), self._base.tensor(first.base)
        if not (recipe.gathered or first.at) and (have.dtype, have.shape) != (kept.dtype, kept.shape):
            raise RuleError(
                f"{tie.rule.where}: {tie.base} is {have.dtype} {list(have.shape)} and cannot be tied to {first.base}, "
                f"which is {kept.dtype} {list(kept.shape)}; leave it as a tensor of its own"
            )
        self._aliases[tie.base] = owner

    def _only_name(self, name: str) -> str | None:
        canonical = self._names.take_apart(name)
        renamed = self._renamed.get(canonical.parameter, [canonical.parameter])
        return canonical.renamed(renamed[0]) if len(renamed) == 1 else None

    # tensors

    def _one(self, name: str, shown: Shown) -> LogicalTensor:
        tensor = self._base.tensor(shown.base)
        placed = self._placed(tensor, shown)
        if placed is None:
            return replace(tensor, name=name)
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments, None, dict(tensor.meta))

    def _placed(self, tensor: LogicalTensor, shown: Shown) -> Placed | None:
        """The shown part of a tensor, or None when it is shown as it is."""
        if shown.moves:
            self._check_shape(tensor, shown)
        return self._shaping.placed(tensor, shown)

    def _check_shape(self, tensor: LogicalTensor, shown: Shown) -> None:
        """What a rule says of a weight's dimensions holds for states of the weight's shape, and for no others."""
        if not shown.name.state and not tensor.shape:
            raise RuleError(
                f"{shown.where}: {tensor.name} has shape [], and the rule is about dimensions; leave it out"
            )
        if not shown.name.state or not tensor.shape:
            return
        weight = self._base.tensor(f"{MODEL}.{shown.name.parameter}")
        if tensor.shape != weight.shape:
            raise RuleError(
                f"{shown.where}: {tensor.name} has shape {list(tensor.shape)} and its weight {list(weight.shape)}; the "
                "rule cannot be applied to both, so read the weights without the optimizer"
            )

    def _gathered(self, name: str, recipe: _Recipe) -> Placed:
        pieces = [(at, shown, self._base.tensor(shown.base)) for (at, _), shown in sorted(recipe.pieces.items())]
        if not all(tensor.shape for _, _, tensor in pieces):
            return self._counter(name, [(shown, tensor) for _, shown, tensor in pieces])
        layers: dict[tuple[int, ...], list[tuple[Shown, Placed]]] = {}
        for at, shown, tensor in pieces:
            if shown.part_count > 1:
                self._check_shape(tensor, shown)
            placed = self._placed(tensor, shown) or Placed(tensor.dtype, tensor.shape, tuple(tensor.fragments))
            layers.setdefault(at, []).append((shown, placed))
        return stacked(name, {at: self._shaping.joined(name, parts) for at, parts in layers.items()})

    def _counter(self, name: str, pieces: Sequence[tuple[Shown, LogicalTensor]]) -> Placed:
        """The one counter of what is put together, which must be the same everywhere."""
        found: dict[tuple[str, bytes], LogicalTensor] = {}
        for shown, tensor in pieces:
            if tensor.shape or not shown.name.state:
                odd = next(tensor for _, tensor in pieces if not tensor.shape)
                raise RuleError(f"{shown.where}: {odd.name} has shape []; it cannot be joined or stacked as {name}")
            found.setdefault((tensor.dtype, self._scalar(tensor)), tensor)
        if len(found) > 1:
            first, second = itertools.islice((tensor.name for tensor in found.values()), 2)
            raise RuleError(
                f"{pieces[0][0].where}: {first} and {second} hold different numbers, and {name} can hold one; read the "
                "weights without the optimizer"
            )
        tensor = pieces[0][1]
        return Placed(tensor.dtype, tensor.shape, tuple(tensor.fragments))

    def _scalar(self, tensor: LogicalTensor) -> bytes:
        (fragment,) = tensor.fragments
        data = bytearray(itemsize(tensor.dtype))
        read = self._base.read_verified if isinstance(self._base, Verifying) else self._base.files.read_into
        read(fragment.file, fragment.offset, memoryview(data))
        return bytes(data)


class _VerifyingView(_View, WrappingVerifying):
    """Of a source whose files carry checksums."""


def _nth(number: int, extents: Sequence[int]) -> tuple[int, ...]:
    """The place of a number that counts through ``extents``, the last one fastest."""
    at: list[int] = []
    for extent in reversed(extents):
        number, rest = divmod(number, extent)
        at.append(rest)
    return tuple(reversed(at))


def _templates(view: View) -> list[str]:
    if view.split is not None:
        return [part.rename for part in view.split.parts]
    return [view.rename if view.rename is not None else "{name}"]


def _with_groups(values: object, renamed: Mapping[str, list[str]]) -> object:
    """Values whose optimizers' parameter groups name the parameters as shown."""
    if not isinstance(values, dict) or not renamed:
        return values
    made = dict(values)
    for key, value in values.items():
        groups = value.get("param_groups") if isinstance(value, dict) else None
        if isinstance(groups, list):
            made[key] = {**value, "param_groups": [_renamed_group(group, renamed) for group in groups]}
    return made


def _renamed_group(group: object, renamed: Mapping[str, list[str]]) -> object:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return group
    names: list[object] = []
    for name in group["params"]:
        names += renamed.get(name, [name]) if isinstance(name, str) else [name]
    return {**group, "params": list(dict.fromkeys(names))}
