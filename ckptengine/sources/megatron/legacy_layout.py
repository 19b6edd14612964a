"""Which pieces of which weights a rank of Megatron's legacy folders holds, and under what names."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptengine.errors import RuleError, UnusableRequest
from ckptengine.layout.box import Box
from ckptengine.sources.rules.language import Replicated, Rule, Rules, Sharded
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.writer import Job

_STACKED = re.compile(r"((?:.*\.)?layers\.)(?!\d)(.+)")
_NUMBERED = re.compile(r"((?:.*?\.)?layers\.)(\d+)\.(.+)")
_STACKED_EXPERTS = re.compile(r"(.*\.experts\.)experts\.(?!\d)(.+)")
_NUMBERED_EXPERTS = re.compile(r"(.*\.experts\.)(?:local_)?experts\.(\d+)\.(.+)")
_FIRST = re.compile(r"(language_model\.)?embedding\..*|.*word_embeddings\.weight|.*position_embeddings\.weight")
_VOCABULARY = re.compile(r".*word_embeddings\.weight|.*output_layer\.(weight|bias)")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_PRESET = "megatron-gpt"

Rank = tuple[int, int, int]
"""Tensor-, pipeline- and expert-parallel rank."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a rank: its name there, boxes of a weight that follow one another, and rows of zeros after them."""

    local: str
    tensor: str
    boxes: tuple[Box, ...]
    shape: tuple[int, ...]
    padding: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """A weight, or one layer and expert of a stacked one; ``lead`` are its indices on the stacked dimensions."""

    name: str
    tensor: str
    shape: tuple[int, ...]
    lead: tuple[int, ...]
    section: str = ""
    layer: int = 0
    expert: int | None = None


class LegacyLayout:
    """Weights on tensor-, pipeline-, virtual-pipeline-, expert- and expert-tensor-parallel ranks.

    Layers go round the pipeline stages once for each virtual stage, evenly; experts are dealt out evenly.  How a tensor
    is cut follows from the given rules, else from the preset ``megatron-gpt``.
    """

    def __init__(self, job: Job, values: Mapping[str, object]) -> None:
        layout = job.layout
        if layout.cp != 1:
            raise UnusableRequest("legacy folders know nothing of context parallelism; leave out cp")
        self.tp, self.pp, self.chunks, self.ep = layout.tp, layout.pp, layout.vpp, layout.ep or 1
        self.etp = layout.etp or layout.tp
        if self.chunks > 1 and self.pp == 1:
            raise UnusableRequest("virtual pipeline stages (vpp) need pp > 1")
        self._job = job
        self._values = values
        self._own = load_rules(job.rules) if job.rules is not None else None
        preset = load_rules(_PRESET)
        known = {**preset.variables, **(self._own.variables if self._own is not None else {})}
        self._preset = dataclasses.replace(preset, variables=known)
        unit = job.options.get("vocab_divisible_by", 0)
        if not isinstance(unit, int) or isinstance(unit, bool) or unit < 0:
            raise UnusableRequest(f"option vocab_divisible_by = {unit!r}; it is a number of rows such as 128")
        self._unit = unit
        weights = [name for name in job.names if name.startswith("model.") and name not in job.aliases]
        if not weights:
            raise UnusableRequest("there is nothing under model. to write for Megatron; rename the weights with rules")
        self._parts = [part for name in weights for part in self._spread(name)]
        self._counts = self._check()

    @property
    def layers(self) -> int:
        """How many there are in all but those that predict further tokens."""
        return next(iter(self._counts.values()), 0)

    def ranks(self) -> list[Rank]:
        """All ranks that have a folder of their own."""
        pairs = {(n % self.tp, n // self.etp % self.ep) for n in range(self.tp * self.ep * self.etp)}
        return [(tp, pp, ep) for tp, ep in sorted(pairs) for pp in range(self.pp)]

    def folder(self, rank: Rank) -> str:
        """What Megatron calls a rank's folder."""
        tp, pp, ep = rank
        return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "") + (f"_{ep:03d}" if self.ep > 1 else "")

    def pieces(self, rank: Rank, chunk: int) -> list[Piece]:
        """What a rank holds of one virtual stage."""
        tp, pp, ep = rank
        stage, last = chunk * self.pp + pp, self.pp * self.chunks - 1
        found: list[Piece] = []
        for part in self._parts:
            local = part.name
            if part.expert is not None:
                own, number = divmod(part.expert, self._experts // self.ep)
                if own != ep:
                    continue
                match = _NUMBERED_EXPERTS.fullmatch(local)
                assert match is not None
                local = f"{match[1]}local_experts.{number}.{match[3]}"
            if part.section and not part.section.startswith("mtp."):
                own, number = divmod(part.layer, self._counts[part.section] // (last + 1))
                local = local.replace(f"{part.section}{part.layer}.", f"{part.section}{number}.", 1)
            else:
                own = 0 if _FIRST.fullmatch(part.name) and not part.section else last
            if own == stage:
                found.append(self._cut(part, local, tp))
            if part.name == _EMBEDDING and self._is_tied and stage == last > 0:
                found.append(self._cut(part, _OUTPUT, tp))  # a copy, trained alike
        return found

    # the weights

    def _spread(self, tensor: str) -> Iterator[_Part]:
        """A weight as one part for each layer and expert that is stacked in it."""
        name, shape = tensor.removeprefix("model."), self._job.tensor(tensor).shape
        stacked, experts = _STACKED.fullmatch(name), _STACKED_EXPERTS.fullmatch(name)
        axes = [shape[: int(stacked is not None)], shape[int(stacked is not None) :][: int(experts is not None)]]
        for lead in itertools.product(*(range(n) for axis in axes for n in axis)):
            shown, numbers = name, list(lead)
            if stacked is not None:
                shown = f"{stacked[1]}{numbers.pop(0)}.{stacked[2]}"
            if experts is not None and (match := _STACKED_EXPERTS.fullmatch(shown)) is not None:
                shown = f"{match[1]}local_experts.{numbers.pop(0)}.{match[2]}"
            layer, expert = _NUMBERED.fullmatch(shown), _NUMBERED_EXPERTS.fullmatch(shown)
            yield _Part(
                shown,
                tensor,
                shape[len(lead) :],
                lead,
                layer[1] if layer is not None else "",
                int(layer[2]) if layer is not None else 0,
                int(expert[2]) if expert is not None else None,
            )

    def _check(self) -> dict[str, int]:
        """How many layers each section has; `UnusableRequest` for what does not divide."""
        counts: dict[str, int] = {}
        for part in self._parts:
            if part.section:
                counts[part.section] = max(counts.get(part.section, 0), part.layer + 1)
        dealt = {section: count for section, count in counts.items() if not section.startswith("mtp.")}
        stages = self.pp * self.chunks
        if len(dealt) > 1 and stages > 1:
            raise UnusableRequest(f"{' and '.join(dealt)} are not dealt out over pipeline stages; write them with pp=1")
        for count in dealt.values():
            if count % stages:
                raise UnusableRequest(f"{count} layers do not divide into {stages} pipeline stages")
        self._experts = 1 + max((part.expert for part in self._parts if part.expert is not None), default=-1)
        if self._experts % self.ep or (self.ep > 1 and not self._experts):
            raise UnusableRequest(f"{self._experts} experts do not divide into ep={self.ep}")
        names = {part.name for part in self._parts}
        self._is_tied = _EMBEDDING in names and not names & {_OUTPUT, f"lm_head.{_OUTPUT}"}
        return dealt

    # cutting

    def _cut(self, part: _Part, local: str, tp: int) -> Piece:
        """The piece of a tensor-parallel rank."""
        degree = self.tp if part.expert is None else self.etp
        claim, rules = self._rule(part.name)
        if claim is not None and claim.pieces is not None:
            raise RuleError(f"{claim.where}: {part.name} holds fused experts, which are not written to legacy folders")
        if _VOCABULARY.fullmatch(part.name) and part.shape:
            return self._vocabulary(part, local, tp)
        if degree == 1 or not part.shape:
            return self._piece(part, local, [Box.whole(part.shape)])
        if claim is None or claim.layout is None:
            raise RuleError(f"{part.name} is to lie on {degree} tensor-parallel ranks, and no rule says how it is cut")
        if isinstance(claim.layout, Replicated):
            return self._piece(part, local, [Box.whole(part.shape)])
        return self._piece(part, local, self._sharded(part, claim, rules, tp % degree, degree))

    def _sharded(self, part: _Part, rule: Rule, rules: Rules, rank: int, degree: int) -> list[Box]:
        shape, layout = part.shape, rule.layout
        if not isinstance(layout, Sharded) or layout.widths is not None or layout.dim >= len(shape):
            raise RuleError(f"{rule.where}: {part.name} of shape {list(shape)} cannot be cut over {degree} ranks by it")
        widths = [rules.value(width, self._values, rule.where) for width in layout.parts]
        widths = [width for width in widths if width]
        if min(widths, default=-1) < 0:
            raise RuleError(
                f"{rule.where}: the parts of {part.name} have widths {widths}; they count from 0, one from 1"
            )
        unit, rest = divmod(shape[layout.dim], sum(widths) * degree)
        if rest or (len(widths) > 1 and layout.dim):
            raise RuleError(f"{rule.where}: {part.name} of shape {list(shape)} does not divide over {degree} ranks")
        boxes, start = [], 0
        for width in widths:
            offsets = tuple(start + rank * width * unit if d == layout.dim else 0 for d in range(len(shape)))
            extents = tuple(width * unit if d == layout.dim else n for d, n in enumerate(shape))
            boxes.append(Box(offsets, extents))
            start += width * unit * degree
        return boxes

    def _vocabulary(self, part: _Part, local: str, tp: int) -> Piece:
        """Rows of the vocabulary, with zeros after the last where a multiple of so many is wanted."""
        rows, rest = part.shape[0], part.shape[1:]
        unit = self._unit * self.tp if self._unit else 1
        padded = -(-rows // unit) * unit
        each, over = divmod(padded, self.tp)
        if over:
            raise RuleError(
                f"{part.name} of shape {list(part.shape)} does not divide over {self.tp} ranks; Megatron pads the "
                "vocabulary: --option vocab_divisible_by=128"
            )
        first = min(tp * each, rows)
        count = min(each, rows - first)
        return self._piece(part, local, [Box((first, *(0 for _ in rest)), (count, *rest))], each - count)

    def _piece(self, part: _Part, local: str, boxes: list[Box], padding: int = 0) -> Piece:
        shape = boxes[0].shape
        if len(boxes) > 1 or padding:
            shape = (sum(box.shape[0] for box in boxes) + padding, *shape[1:])
        ones = (1,) * len(part.lead)
        moved = tuple(Box((*part.lead, *box.offsets), (*ones, *box.shape)) for box in boxes)
        return Piece(local, part.tensor, moved, shape, padding)

    def _rule(self, name: str) -> tuple[Rule | None, Rules]:
        """The rule that says how a weight is cut, and the rules whose variables it uses."""
        for rules in (self._own, self._preset):
            claim = rules.layout_rule(name) if rules is not None else None
            if rules is not None and claim is not None:
                return claim[0], rules
        return None, self._preset
