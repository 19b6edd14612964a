"""The parameters of a model in the order of its modules, and which parts of them a rank trained.  Pure.

A ``torch_dist`` checkpoint says how each weight was cut, but neither what order the modules had nor which rank held
what.  `models` lists the orders in question; the caller tells by sizes and contents which one it was.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptengine.layout.box import Box
from ckptengine.sources.dcp.metadata import TensorRecord

_STACKED = re.compile(r"((?:.*\.)?layers\.)(?!\d)(.+)")
_NUMBERED = re.compile(r"((?:.*?\.)?layers\.)(\d+)\.(.+)")
_BUFFERS = re.compile(r".*(\.expert_bias|inv_freq|_extra_state.*|local_tokens_per_expert)")
TIED = "embedding.word_embeddings.weight"
OUTPUTS = {"output_layer.weight", "lm_head.output_layer.weight"}
MAX_LAYERS = 4096

_ATTENTION = (
    r"linear_proj", r"linear_(qkv|q_down_proj|q_proj|q)\b", r"linear_q_up_proj", r"linear_kv_down_proj",
    r"linear_(kv_up_proj|kv)\b", r"q_layernorm", r"kv?_layernorm",
)  # fmt: skip
_MLP = (
    r"pre_mlp_layernorm|mlp\.linear_fc1\.layer_norm", r"router", r"\.experts\.", r"shared_experts\.gate",
    r"shared_experts\.linear_fc1", r"shared_experts\.linear_fc2", r"mlp\.linear_fc1", r"mlp\.linear_fc2",
    r"\bfinal_layernorm",
)  # fmt: skip
_HEAD = (r"\benorm", r"\bhnorm", r"eh_proj")
_REST = (
    *(f"self_attention\\.{part}" for part in _ATTENTION),
    r"pre_cross_attn",
    *(f"cross_attention\\.{part}" for part in _ATTENTION),
    *_MLP,
)
_LAYER_ORDERS: tuple[tuple[str, ...], ...] = (
    (*_HEAD, r"input_layernorm|self_attention\.linear_q\w*\.layer_norm", *_REST),
    (*_HEAD, r"input_layernorm", r"self_attention\.linear_proj", r"self_attention\.linear_q\w*\.layer_norm", *_REST),
)
"""The order of a layer's modules: with norms of their own, and with norms fused into the layers that follow them."""

_MODEL_ORDER = (
    r".*\bword_embeddings", r".*\bposition_embeddings", r".*embedding", r".*encoder\.layers", r".*encoder\.",
    r".*decoder\.layers", r".*decoder\.", r"mtp\.layers", r".*lm_head\.dense", r".*lm_head\.layer_norm",
    r".*output_layer", r".*binary_head",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """A rank's part of a parameter: the boxes of the weight under ``key`` that it is made of, one after another.

    ``is_copy``: another rank holds the same one.  ``is_turned``: matrices lie there the other way round, those that
    differ in their rows only side by side (experts fused for one matrix product).
    """

    key: str
    dtype: str
    boxes: tuple[Box, ...]
    is_copy: bool = False
    is_turned: bool = False

    @property
    def size(self) -> int:
        return sum(box.size for box in self.boxes)


Entry = tuple[str, int | None]
"""A key, and the index on its first dimension where that is made of layers."""

SINGLE, BY_MATRIX, FUSED = LAYOUTS = ("single", "by matrix", "fused")
"""How experts lie on a rank: one after another with all of their parameters, one matrix of all of them after another,
or each matrix of all of them as one parameter."""

Copies = tuple[bool, bool]
"""Whether there is a copy of the embedding before and after the blocks of a stage."""

NO_COPIES: Copies = (False, False)


@dataclass(frozen=True, slots=True)
class Degrees:
    """Tensor-, expert- and pipeline-parallel degree; ranks count tensor-parallel first, pipeline last."""

    tp: int
    ep: int
    pp: int

    @property
    def size(self) -> int:
        return self.tp * self.ep * self.pp

    def ranks(self, pp: int) -> Iterator[tuple[int, int, int]]:
        """(rank, tensor-parallel rank, expert-parallel rank) of those on a pipeline stage."""
        for ep, tp in itertools.product(range(self.ep), range(self.tp)):
            yield tp + self.tp * (ep + self.ep * pp), tp, ep


@dataclass(frozen=True, slots=True)
class Model:
    """A model's parameters in order, as blocks that lie on one rank each: a layer, or a parameter outside of layers."""

    weights: Mapping[str, TensorRecord]
    blocks: tuple[tuple[Entry, ...], ...]
    experts: str
    _boxes: dict[tuple[str, int], dict[tuple[int, ...], list[Box]]] = field(default_factory=dict)

    @property
    def copies(self) -> tuple[Copies, ...]:
        """The copies of the embedding that a later stage may have: before its layers, to predict more than one token;
        after them, as an output layer that is tied to it.
        """
        if TIED not in self.weights:
            return (NO_COPIES,)
        after = (False,) if self.weights.keys() & OUTPUTS else (False, True)
        before = (False, True) if any(key.startswith("mtp.") for key in self.weights) else (False,)
        return tuple(itertools.product(before, after))

    def parameters(self, block: int, tp: int, ep: int, degrees: Degrees) -> list[Parameter]:
        """A rank's parts of the parameters of a block."""
        found: list[Parameter] = []
        experts = [entry for entry in self.blocks[block] if is_expert(entry[0])]
        for key, layer in self.blocks[block]:
            if not is_expert(key):
                found.append(self.part(key, layer, tp, degrees.tp))
            elif (key, layer) == experts[0]:
                found += self._of_experts(experts, tp, ep, degrees)
        return found

    def part(self, key: str, layer: int | None, tp: int, tps: int, expert: int | None = None) -> Parameter:
        """A tensor-parallel rank's part of a parameter: every ``tps``-th piece of it, or all of it."""
        at = tuple(number for number in (layer, expert) if number is not None)
        boxes = self._boxes_of(key, len(at)).get(at, [])
        mine = boxes if len(boxes) % tps else boxes[tp::tps]
        return Parameter(key, self.weights[key].dtype, tuple(mine), tp > 0 and len(boxes) == 1)

    def _of_experts(self, entries: Sequence[Entry], tp: int, ep: int, degrees: Degrees) -> Iterator[Parameter]:
        """The parameters of a rank's experts, laid out in one of `LAYOUTS`."""
        key, layer = entries[0]
        count = self.weights[key].shape[0 if layer is None else 1] // degrees.ep
        experts = range(ep * count, (ep + 1) * count)
        if self.experts == FUSED:
            for name, at in entries:
                together = self.part(name, at, tp, degrees.tp, experts[0]).boxes
                axis = 0 if at is None else 1
                boxes = tuple(part for index in range(count) for box in together for part in _index(box, axis, index))
                yield Parameter(name, self.weights[name].dtype, boxes, is_turned=True)
            return
        matrices = [list(group) for _, group in itertools.groupby(entries, lambda entry: entry[0].rpartition(".")[0])]
        for runs in [entries] if self.experts == SINGLE else matrices:
            for expert in experts:
                yield from (self.part(name, at, tp, degrees.tp, expert) for name, at in runs)

    def _boxes_of(self, key: str, axes: int) -> dict[tuple[int, ...], list[Box]]:
        """The boxes of a weight in order, by their offsets on the first ``axes`` dimensions (layers, experts)."""
        if (key, axes) not in self._boxes:
            found: dict[tuple[int, ...], list[Box]] = defaultdict(list)
            for chunk in sorted(self.weights[key].chunks, key=lambda chunk: chunk.offsets):
                if 0 not in chunk.shape:
                    found[chunk.offsets[:axes]].append(Box(chunk.offsets, chunk.shape))
            self._boxes[key, axes] = found
        return self._boxes[key, axes]


def models(weights: Mapping[str, TensorRecord], experts: bool | None) -> Iterator[Model]:
    """The orders that the modules of ``weights`` can have, likely ones first; ``experts``: only they, or all but they.

    The order in which the checkpoint names them is the module's, unless ranks shared out what they wrote.
    """
    trained = {
        key: record
        for key, record in weights.items()
        if not is_buffer(key) and (experts is None or experts == is_expert(key))
    }
    seen = set()
    for order in (None, *_LAYER_ORDERS):
        blocks = _blocks(trained, order)
        for layout in LAYOUTS if any(map(is_expert, trained)) else (SINGLE,):
            if blocks is not None and (blocks, layout) not in seen:
                seen.add((blocks, layout))
                yield Model(trained, blocks, layout)


def _blocks(weights: Mapping[str, TensorRecord], order: Sequence[str] | None) -> tuple[tuple[Entry, ...], ...] | None:
    """The blocks in the order in which the weights are named, or by ``order``; None where layers make no sense."""
    sections: dict[str, dict[int, list[tuple[Entry, str]]]] = {}
    for key, record in weights.items():
        if match := _STACKED.fullmatch(key):
            if not record.shape or record.shape[0] > MAX_LAYERS:
                return None
            for layer in range(record.shape[0]):
                sections.setdefault(match[1], {}).setdefault(layer, []).append(((key, layer), match[2]))
        elif match := _NUMBERED.fullmatch(key):
            sections.setdefault(match[1], {}).setdefault(int(match[2]), []).append(((key, None), match[3]))
        else:
            sections[key] = {0: [((key, None), key)]}
    names = sections if order is None else sorted(sections, key=lambda name: _rank(name, _MODEL_ORDER, re.match))
    blocks = []
    for name in names:
        for _, row in sorted(sections[name].items()):
            if order is not None:
                row.sort(key=lambda entry: _rank(entry[1], order, re.search))
            blocks.append(tuple(entry for entry, _ in row))
    return tuple(blocks)


def _index(box: Box, dim: int, at: int) -> Iterator[Box]:
    """The ``at``-th index of a dimension of a box, if there are so many."""
    if at < box.shape[dim]:
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[dim] += at
        shape[dim] = 1
        yield Box(tuple(offsets), tuple(shape))


def is_buffer(key: str) -> bool:
    """Whether ``key`` names something of a module that is not trained."""
    return _BUFFERS.fullmatch(key) is not None


def is_expert(key: str) -> bool:
    """Whether ``key`` names a part of an expert, shared ones left aside."""
    return ".experts." in key


def _rank(name: str, order: Sequence[str], matches: Callable[[str, str], object]) -> tuple[int, bool]:
    place = next((number for number, part in enumerate(order) if matches(part, name)), len(order))
    return place, name.endswith("bias")
