"""A source shown under other names and shapes, as the view keys of rules say, without moving a byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptengine.errors import NotFound, RuleError
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.port import Checksummed, Source, Verifying
from ckptengine.sources.rules.algebra import (
    Placed,
    Segment,
    concatenate,
    grouped,
    index,
    narrow,
    regrouped,
    remap,
    stack,
    transpose,
)
from ckptengine.sources.rules.captures import Captures
from ckptengine.sources.rules.language import Regroup, Rule, Rules, View
from ckptengine.sources.rules.names import Canonical, Names
from ckptengine.sources.wrapping import Wrapping


@dataclass(frozen=True, slots=True)
class _Shown:
    """One tensor of the base source, and what of it is shown."""

    base: str
    name: Canonical
    rule: Rule | None = None
    at: tuple[int, ...] = ()
    part: int | None = None

    @property
    def view(self) -> View | None:
        return self.rule.view if self.rule is not None else None

    @property
    def part_count(self) -> int:
        """How many tensors are joined into the one that this is a part of."""
        return len(self.view.join.widths) if self.view is not None and self.view.join is not None else 1


_Place = tuple[tuple[int, ...], int]


@dataclass(slots=True)
class _Recipe:
    """What one shown tensor is made of: by its place on the stacked dimensions and by part (0 when not joined)."""

    pieces: dict[_Place, _Shown] = field(default_factory=dict)
    gathered: bool = False


def present(source: Source, rules: Rules) -> Source:
    """``source`` as the view keys of ``rules`` show it.

    Raises `RuleError` for a rule that matches nothing, two rules that claim one tensor, two tensors that get one name,
    and parts or layers that are missing.
    """
    return _VerifyingView(source, rules) if isinstance(source, Verifying) else _View(source, rules)


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
        for name in names:
            claim = claims[taken[name].parameter]
            if claim is None:
                self._add(name, _Shown(name, taken[name]))
            else:
                self._show(name, taken[name], claim[0], Captures(claim[1]))
        for recipe_name, recipe in self._recipes.items():
            if recipe.gathered:
                self._complete(recipe_name, recipe)

    # the port

    def names(self) -> Sequence[str]:
        return [*self._recipes, *(alias for alias in self._aliases if alias not in self._recipes)]

    def aliases(self) -> Mapping[str, str]:
        shown = dict(self._aliases)
        for alias, owner in self._base.aliases().items():
            new, target = self._only_name(alias), self._only_name(owner)
            if new in self._recipes and target in self._recipes and new != target:
                shown.setdefault(new, target)
        return shown

    def checksums(self) -> Mapping[str, str]:
        """See `ckptengine.sources.port.Checksummed`."""
        return self._base.checksums() if isinstance(self._base, Checksummed) else {}

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
        placed = self._gather(name, recipe)
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments)

    # names

    def _show(self, name: str, canonical: Canonical, rule: Rule, captures: Captures) -> None:
        view = rule.view
        assert view is not None
        if view.drop:
            self._renamed.setdefault(canonical.parameter, [])
            return
        if view.tied is not None:
            if not canonical.state:
                self._aliases[name] = canonical.renamed(captures.fill(view.tied, rule))
            return
        for at in self._indices(name, canonical, rule, view):
            for part, template in enumerate(_templates(view)):
                parameter = captures.fill(template, rule, at)
                shown = _Shown(name, canonical, rule, at, part if view.split else None)
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

    def _add(self, target: str, shown: _Shown, piece: _Place | None = None) -> None:
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
        needed = itertools.product(itertools.product(*map(range, extents)), range(parts))
        missing = next((piece for piece in needed if piece not in recipe.pieces), None)
        if missing is not None:
            layer = ", ".join(map(str, missing[0])) or "0"
            total = " x ".join(map(str, extents)) or "1"
            raise RuleError(
                f"{name} cannot be put together under the rules {self._rules.name}: layer {layer}, part "
                f"{missing[1]} is missing (layers count from 0, {total} of them; {parts} part(s) each)"
            )

    def _only_name(self, name: str) -> str | None:
        canonical = self._names.take_apart(name)
        renamed = self._renamed.get(canonical.parameter, [canonical.parameter])
        return canonical.renamed(renamed[0]) if len(renamed) == 1 else None

    # tensors

    def _one(self, name: str, shown: _Shown) -> LogicalTensor:
        tensor = self._base.tensor(shown.base)
        placed = self._placed(tensor, shown)
        if placed is None:
            return replace(tensor, name=name)
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments, None, dict(tensor.meta))

    def _placed(self, tensor: LogicalTensor, shown: _Shown) -> Placed | None:
        """The shown part of a tensor, or None when it is shown as it is."""
        view = shown.view
        if view is None or shown.rule is None or not tensor.shape:
            return None
        if not (view.unstack or view.unpadded or view.regroup or view.split or view.transpose):
            return None
        where = f"{shown.rule.where}, {shown.base} of shape {list(tensor.shape)}"
        placed = Placed(tensor.dtype, tensor.shape, tuple(tensor.fragments))
        for dim, at in sorted(zip(view.unstack, shown.at, strict=True), reverse=True):
            placed = index(placed, _dim(placed, dim, where), at)
        if view.unpadded is not None:
            placed = self._unpadded(placed, view, where)
        if view.regroup is not None:
            placed = self._regrouped(placed, view.regroup, where)
        if view.split is not None and shown.part is not None:
            dim = _dim(placed, view.split.dim, where)
            widths = [self._rules.value(part.width, self._values, where) for part in view.split.parts]
            groups = self._rules.value(view.split.groups, self._values, where)
            try:
                segments = grouped(placed.shape[dim], widths, groups)[shown.part]
            except RuleError as error:
                raise RuleError(f"{where}: {error}") from None
            placed = remap(placed, dim, sum(segment.length for segment in segments), segments)
        if view.transpose is not None and len(placed.shape) > 1:
            if len(view.transpose) != len(placed.shape):
                raise RuleError(f"{where}: transpose = {list(view.transpose)} does not fit its dimensions")
            placed = transpose(placed, view.transpose)
        return placed

    def _regrouped(self, placed: Placed, regroup: Regroup, where: str) -> Placed:
        dim = _dim(placed, regroup.dim, where)
        widths = [self._rules.value(width, self._values, where) for width in regroup.widths]
        before, after = (self._rules.value(n, self._values, where) for n in (regroup.before, regroup.after))
        try:
            return remap(placed, dim, placed.shape[dim], regrouped(placed.shape[dim], widths, before, after))
        except RuleError as error:
            raise RuleError(f"{where}: {error}") from None

    def _unpadded(self, placed: Placed, view: View, where: str) -> Placed:
        assert view.unpadded is not None
        extent = self._rules.value(view.unpadded.extent, self._values, where)
        dim = _dim(placed, view.unpadded.dim, where)
        if extent > placed.shape[dim]:
            raise RuleError(f"{where}: dimension {dim} has only {placed.shape[dim]} indices, not {extent} or more")
        return narrow(placed, dim, 0, extent) if extent else placed

    def _gather(self, name: str, recipe: _Recipe) -> Placed:
        layers: dict[tuple[int, ...], list[Placed]] = {}
        for (place, _), shown in sorted(recipe.pieces.items()):
            tensor = self._base.tensor(shown.base)
            placed = self._placed(tensor, shown) or Placed(tensor.dtype, tensor.shape, tuple(tensor.fragments))
            if not tensor.shape:
                return placed  # counters are kept once
            layers.setdefault(place, []).append(placed)
        first = next(iter(recipe.pieces.values()))
        made = {place: self._joined(name, first, parts) for place, parts in layers.items()}
        if len({(placed.dtype, placed.shape) for placed in made.values()}) > 1:
            shapes = sorted({placed.shape for placed in made.values()})
            raise RuleError(f"{name} cannot be stacked: its layers have shapes {shapes}")
        return _stacked(made)

    def _joined(self, name: str, shown: _Shown, parts: list[Placed]) -> Placed:
        join = shown.view.join if shown.view is not None else None
        if join is None or shown.rule is None:
            return parts[0]
        where = f"{shown.rule.where}, {name}"
        dim = _dim(parts[0], join.dim, where)
        if len({(p.dtype, *p.shape[:dim], -1, *p.shape[dim + 1 :]) for p in parts}) > 1:
            raise RuleError(f"{where}: parts of shapes {[list(p.shape) for p in parts]} do not join on dimension {dim}")
        whole = concatenate(parts, dim)
        widths = [self._rules.value(width, self._values, where) for width in join.widths]
        groups = self._rules.value(join.groups, self._values, where)
        tables = grouped(whole.shape[dim], widths, groups)
        if [sum(segment.length for segment in table) for table in tables] != [part.shape[dim] for part in parts]:
            raise RuleError(f"{where}: parts of shapes {[list(p.shape) for p in parts]} do not have widths {widths}")
        segments = []
        start = 0
        for part, table in zip(parts, tables, strict=True):
            segments += [Segment(start + segment.target, segment.source, segment.length) for segment in table]
            start += part.shape[dim]
        return remap(whole, dim, start, segments)


class _VerifyingView(_View):
    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        """See `ckptengine.sources.port.Verifying`."""
        assert isinstance(self._base, Verifying)
        self._base.read_verified(path, offset, view)


def _stacked(tensors: Mapping[tuple[int, ...], Placed]) -> Placed:
    """Tensors by their places on new leading dimensions, in order, as one."""
    if () in tensors:
        return tensors[()]
    rows: dict[int, dict[tuple[int, ...], Placed]] = {}
    for (first, *rest), placed in tensors.items():
        rows.setdefault(first, {})[tuple(rest)] = placed
    return stack([_stacked(row) for row in rows.values()])


def _templates(view: View) -> list[str]:
    if view.split is not None:
        return [part.rename for part in view.split.parts]
    return [view.rename if view.rename is not None else "{name}"]


def _dim(placed: Placed, dim: int, where: str) -> int:
    if dim >= len(placed.shape):
        raise RuleError(f"{where}: there is no dimension {dim}")
    return dim


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
