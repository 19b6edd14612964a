"""What the view keys of rules make of the elements of tensors: cut, put in order, joined and stacked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptengine.errors import RuleError
from ckptengine.layout.tensor import LogicalTensor
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
from ckptengine.sources.rules.language import Join, Regroup, Rule, Rules, Unpadded, View
from ckptengine.sources.rules.names import Canonical


@dataclass(frozen=True, slots=True)
class Shown:
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
    def where(self) -> str:
        """The rule, for messages."""
        return self.rule.where if self.rule is not None else "no rule"

    @property
    def part_count(self) -> int:
        """How many tensors are joined into the one that this is a part of."""
        return len(self.view.join.widths) if self.view is not None and self.view.join is not None else 1

    @property
    def moves(self) -> tuple[object, ...]:
        """Equal for tensors whose elements are shown in the same way; empty where they stay as they are."""
        view = self.view
        if view is None or not (view.unstack or view.unpadded or view.regroup or view.split or view.transpose):
            return ()
        return view.unstack, view.unpadded, view.regroup, view.split, view.transpose, self.at, self.part


class Shaping:
    """The steps of views; ``values`` gives the checkpoint's own values, where ``[let]`` looks."""

    def __init__(self, rules: Rules, values: Callable[[], object]) -> None:
        self._rules = rules
        self._values = values

    def placed(self, tensor: LogicalTensor, shown: Shown) -> Placed | None:
        """The shown part of a tensor, or None when it is shown as it is."""
        view = shown.view
        if view is None or not tensor.shape or not shown.moves:
            return None
        where = f"{shown.where}, {shown.base} of shape {list(tensor.shape)}"
        placed = Placed(tensor.dtype, tensor.shape, tuple(tensor.fragments))
        for dim, at in sorted(zip(view.unstack, shown.at, strict=True), reverse=True):
            placed = index(placed, _dim(placed, dim, where), at)
        if view.unpadded is not None:
            placed = self._unpadded(placed, view.unpadded, where)
        if view.regroup is not None:
            placed = self._regrouped(placed, view.regroup, where)
        if view.split is not None and shown.part is not None:
            dim = _dim(placed, view.split.dim, where)
            widths = [self._value(part.width, where) for part in view.split.parts]
            groups = self._value(view.split.groups, where)
            with _explaining(where):
                segments = grouped(placed.shape[dim], widths, groups)[shown.part]
            placed = remap(placed, dim, sum(segment.length for segment in segments), segments)
        if view.transpose is not None and (len(placed.shape) > 1 or len(view.transpose) > 2):
            if len(view.transpose) != len(placed.shape):
                raise RuleError(f"{where}: transpose = {list(view.transpose)} does not fit its dimensions")
            placed = transpose(placed, view.transpose)
        return placed

    def joined(self, name: str, parts: Sequence[tuple[Shown, Placed]]) -> Placed:
        """The parts of one fused tensor, in order, as that tensor."""
        joins = [shown.view.join if shown.view is not None else None for shown, _ in parts]
        join = joins[0]
        if join is None:
            return parts[0][1]
        where = f"{parts[0][0].where}, {name}"
        said = [(other.dim, *self._said(other, where)) for other in joins if other is not None]
        for (shown, _), other in zip(parts, said, strict=True):
            if other != said[0]:
                raise RuleError(
                    f"{parts[0][0].where} and {shown.where} join {name} in different ways: dim, widths and groups are "
                    f"{list(said[0])} and {list(other)}; say the same in each of its parts"
                )
        dim, widths, groups = said[0]
        pieces = [placed for _, placed in parts]
        dim = _dim(pieces[0], dim, where)
        shapes = [list(piece.shape) for piece in pieces]
        if len({(p.dtype, *p.shape[:dim], -1, *p.shape[dim + 1 :]) for p in pieces}) > 1:
            kinds = _kinds(pieces)
            raise RuleError(f"{where}: parts of shapes {shapes}{kinds} do not join on dimension {dim}")
        whole = concatenate(pieces, dim)
        with _explaining(where):
            tables = grouped(whole.shape[dim], widths, groups)
        if [sum(segment.length for segment in table) for table in tables] != [piece.shape[dim] for piece in pieces]:
            raise RuleError(f"{where}: parts of shapes {shapes} do not have widths {list(widths)}")
        segments = []
        start = 0
        for piece, table in zip(pieces, tables, strict=True):
            segments += [Segment(start + segment.target, segment.source, segment.length) for segment in table]
            start += piece.shape[dim]
        return remap(whole, dim, start, segments)

    def _said(self, join: Join, where: str) -> tuple[tuple[int, ...], int]:
        return tuple(self._value(width, where) for width in join.widths), self._value(join.groups, where)

    def _value(self, expression: int | str, where: str) -> int:
        return self._rules.value(expression, self._values(), where)

    def _regrouped(self, placed: Placed, regroup: Regroup, where: str) -> Placed:
        dim = _dim(placed, regroup.dim, where)
        widths = [self._value(width, where) for width in regroup.widths]
        before, after = (self._value(n, where) for n in (regroup.before, regroup.after))
        with _explaining(where):
            segments = regrouped(placed.shape[dim], widths, before, after)
        return remap(placed, dim, placed.shape[dim], segments)

    def _unpadded(self, placed: Placed, unpadded: Unpadded, where: str) -> Placed:
        extent = self._value(unpadded.extent, where)
        dim = _dim(placed, unpadded.dim, where)
        if not 0 <= extent <= placed.shape[dim]:
            raise RuleError(f"{where}: dimension {dim} has only {placed.shape[dim]} indices; {extent} cannot be real")
        return narrow(placed, dim, 0, extent) if extent else placed


def stacked(name: str, tensors: Mapping[tuple[int, ...], Placed]) -> Placed:
    """Tensors by their places on new leading dimensions, in order, as one."""
    if len({(placed.dtype, placed.shape) for placed in tensors.values()}) > 1:
        shapes = sorted({placed.shape for placed in tensors.values()})
        raise RuleError(f"{name} cannot be stacked: its layers have shapes {shapes}{_kinds(list(tensors.values()))}")
    return _stacked(tensors)


def _stacked(tensors: Mapping[tuple[int, ...], Placed]) -> Placed:
    if () in tensors:
        return tensors[()]
    rows: dict[int, dict[tuple[int, ...], Placed]] = {}
    for (first, *rest), placed in tensors.items():
        rows.setdefault(first, {})[tuple(rest)] = placed
    return stack([_stacked(row) for row in rows.values()])


def _kinds(tensors: Sequence[Placed]) -> str:
    """The element types, for a message, where they differ."""
    kinds = sorted({placed.dtype for placed in tensors})
    return f" of {', '.join(kinds)}" if len(kinds) > 1 else ""


def _dim(placed: Placed, dim: int, where: str) -> int:
    if dim >= len(placed.shape):
        raise RuleError(f"{where}: there is no dimension {dim}")
    return dim


@contextlib.contextmanager
def _explaining(where: str) -> Iterator[None]:
    """Errors with the rule and the tensor in front."""
    try:
        yield
    except RuleError as error:
        raise RuleError(f"{where}: {error}") from None
