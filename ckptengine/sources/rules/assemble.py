"""From what ranks store to whole tensors: the ``replicated``, ``averaged``, ``shard`` and ``expert`` keys of rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptengine.errors import RuleError
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.rules.algebra import Placed, Segment, concatenate, grouped, remap, reshape
from ckptengine.sources.rules.average import AveragedFiles
from ckptengine.sources.rules.expression import Expression
from ckptengine.sources.rules.language import Averaged, Replicated, Rule, Rules, Sharded
from ckptengine.sources.rules.parse import load_rules, presets


class Assembler:
    """Makes whole tensors of the pieces that tensor- and expert-parallel ranks hold, as rules say.

    ``names`` are the checkpoint's parameters; every rule that is not optional must match one of them.  ``values`` are
    where ``[let]`` looks.  Without rules a tensor held by one rank passes, everything else is refused.
    """

    def __init__(self, rules: Rules | None, names: Sequence[str], values: object, averages: AveragedFiles) -> None:
        self._rules = rules
        self._names = list(names)
        self._values = values
        self._averages = averages
        if rules is not None:
            rules.check(self._names)

    def whole(self, name: str, pieces: Sequence[Placed], *, what: str = "tensor-parallel") -> Placed:
        """The tensor of parameter ``name`` from one piece per rank, in rank order."""
        claim = self._rules.layout_rule(name) if self._rules is not None else None
        if claim is not None and claim[0].pieces is not None:
            pieces = [self._reshaped(name, piece, claim[0], claim[0].pieces) for piece in pieces]
        if len(pieces) == 1:
            return pieces[0]
        if claim is None or claim[0].layout is None:
            raise RuleError(self._no_rule(name, pieces, what))
        rule = claim[0]
        if len({piece.dtype for piece in pieces}) > 1:
            raise RuleError(f"{name}: ranks hold it as {', '.join(sorted({piece.dtype for piece in pieces}))}")
        match rule.layout:
            case Replicated():
                self._equal_shapes(name, pieces, rule, "replicated")
                return pieces[0]
            case Averaged():
                self._equal_shapes(name, pieces, rule, "averaged")
                return average(name, pieces, self._averages)
            case Sharded() as sharded:
                return self._sharded(name, pieces, rule, sharded)
            case _:
                raise RuleError(self._no_rule(name, pieces, what))

    def whole_experts(self, name: str, pieces: Sequence[Placed]) -> Placed:
        """The tensor that holds all experts from one piece per expert-parallel rank."""
        if len(pieces) == 1:
            return pieces[0]
        claim = self._rules.layout_rule(name) if self._rules is not None else None
        if claim is None or claim[0].expert is None:
            raise RuleError(
                f"{name} holds {len(pieces)} expert-parallel ranks' experts of shapes {_shapes(pieces)}, and no rule "
                "says on which dimension they follow one another; add expert = <dimension>"
            )
        return _joined(name, pieces, claim[0], claim[0].expert)

    def _reshaped(self, name: str, piece: Placed, rule: Rule, shape: Sequence[Expression]) -> Placed:
        """The piece under the shape that the rule gives its elements."""
        assert self._rules is not None
        said = [self._rules.value(extent, self._values, f"{rule.where}, pieces") for extent in shape]
        known = math.prod(extent for extent in said if extent != -1)
        size = math.prod(piece.shape)
        extents = tuple(extent if extent != -1 else size // max(known, 1) for extent in said)
        if min(extents) < 0 or math.prod(extents) != size:
            raise RuleError(f"{rule.where}: {name} of shape {list(piece.shape)} does not have the shape {said}")
        return reshape(piece, extents)

    def _sharded(self, name: str, pieces: Sequence[Placed], rule: Rule, sharded: Sharded) -> Placed:
        dim = sharded.dim
        whole = _joined(name, pieces, rule, dim)
        if sharded.parts == (1,) and sharded.widths is None:
            return whole
        extents = [piece.shape[dim] for piece in pieces]
        if sharded.widths is not None:
            return _interleaved(name, whole, rule, dim, extents, [list(row) for row in sharded.widths])
        assert self._rules is not None
        parts = [self._rules.value(part, self._values, f"{rule.where}, parts") for part in sharded.parts]
        try:
            tables = [[part[0].length for part in grouped(extent, parts, 1)] for extent in extents]
        except RuleError as error:
            raise RuleError(f"{rule.where}: {name} of shapes {_shapes(pieces)}, dimension {dim}: {error}") from None
        return _interleaved(name, whole, rule, dim, extents, [list(row) for row in zip(*tables, strict=True)])

    def _equal_shapes(self, name: str, pieces: Sequence[Placed], rule: Rule, word: str) -> None:
        if len({piece.shape for piece in pieces}) > 1:
            raise RuleError(
                f"{rule.where} says that {name} is {word}, but the ranks hold shapes {_shapes(pieces)}; "
                f"it seems to be cut: {_guess(pieces)}"
            )

    def _no_rule(self, name: str, pieces: Sequence[Placed], what: str) -> str:
        lead = f"{name} lies on {len(pieces)} {what} ranks as {_shapes(pieces)}, and no rule says what the pieces mean"
        pattern = name.replace(".", r"\.")
        fitting = fitting_presets(self._names)
        preset = f"the preset(s) {', '.join(fitting)} know(s) these names; else " if fitting else ""
        return (
            f"{lead}. Nothing is put together on a guess: {preset}write a rule file with "
            f"[[rule]] match = '{pattern}' and {_guess(pieces)}, and give it as rules"
        )


def fitting_presets(names: Sequence[str]) -> list[str]:
    """Presets whose layout rules match most of the parameters ``names``."""
    sample = list(names)[:: max(1, len(names) // 200)]
    fitting = []
    for preset in presets():
        try:
            rules = load_rules(preset)
            known = sum(rules.layout_rule(name) is not None for name in sample)
        except RuleError:
            continue
        if sample and known * 10 >= len(sample) * 9:
            fitting.append(preset)
    return fitting


def average(name: str, pieces: Sequence[Placed], averages: AveragedFiles) -> Placed:
    """The mean of equally shaped pieces, each box of it a range of a computed file."""
    found: list[Fragment] = []
    layouts = {tuple(sorted((f.box.offsets, f.box.shape) for f in piece.fragments)) for piece in pieces}
    if len(layouts) > 1 or not all(f.is_contiguous for piece in pieces for f in piece.fragments):
        raise RuleError(f"{name} cannot be averaged: the ranks store it in different pieces")
    ordered = [sorted(piece.fragments, key=lambda f: (f.box.offsets, f.box.shape)) for piece in pieces]
    for same in zip(*ordered, strict=True):
        nbytes = Placed(pieces[0].dtype, same[0].box.shape, ()).nbytes
        path = averages.add(pieces[0].dtype, nbytes, tuple((f.file, f.offset) for f in same))
        found.append(Fragment(same[0].box, path, 0))
    return Placed(pieces[0].dtype, pieces[0].shape, tuple(found))


def _joined(name: str, pieces: Sequence[Placed], rule: Rule, dim: int) -> Placed:
    first = pieces[0].shape
    if dim >= len(first):
        raise RuleError(f"{rule.where}: {name} has shape {list(first)} and no dimension {dim}")
    others = {(*piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in pieces}
    if len(others) > 1 or len({len(piece.shape) for piece in pieces}) > 1:
        raise RuleError(
            f"{rule.where}: {name} has pieces of shapes {_shapes(pieces)}, which do not follow one another along "
            f"dimension {dim}; it seems to be {_guess(pieces)}"
        )
    return concatenate(pieces, dim)


def _interleaved(
    name: str, whole: Placed, rule: Rule, dim: int, extents: Sequence[int], widths: Sequence[Sequence[int]]
) -> Placed:
    """Reorder rank-major pieces of parts (``widths[part][rank]``) to part-major."""
    for rank, extent in enumerate(extents):
        if any(len(row) != len(extents) for row in widths) or sum(row[rank] for row in widths) != extent:
            raise RuleError(f"{rule.where}: widths {[list(r) for r in widths]} do not add up to {name}'s {extents}")
    segments: list[Segment] = []
    target = 0
    starts = [sum(extents[:rank]) for rank in range(len(extents))]
    for part, row in enumerate(widths):
        for rank, length in enumerate(row):
            before = sum(widths[earlier][rank] for earlier in range(part))
            if length:
                segments.append(Segment(starts[rank] + before, target, length))
            target += length
    return remap(whole, dim, sum(extents), segments)


def _shapes(pieces: Sequence[Placed]) -> str:
    shapes = [list(piece.shape) for piece in pieces]
    return str(shapes[0]) if all(shape == shapes[0] for shape in shapes) else str(shapes)


def _guess(pieces: Sequence[Placed]) -> str:
    """What a rule could say, for messages only."""
    shapes = [piece.shape for piece in pieces]
    if all(shape == shapes[0] for shape in shapes):
        return "replicated = true, averaged = true or shard = <dimension>"
    if len({len(shape) for shape in shapes}) == 1:
        differing = [d for d in range(len(shapes[0])) if len({shape[d] for shape in shapes}) > 1]
        if len(differing) == 1:
            return f"shard = {differing[0]}"
    return "shard = <dimension>"
