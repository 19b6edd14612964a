"""Which parts of which parameters a model-parallel rank trained, in the order of its module.  Pure.

A ``torch_dist`` checkpoint says how each weight was cut, but not which rank held what.  `stages` lists the ways in
which that can have been; the caller tells by sizes and contents which one it was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptengine.layout.box import Box
from ckptengine.sources.dcp.metadata import TensorRecord

_STACKED = re.compile(r"((?:.*\.)?layers\.)(?!\d)(.+)")
_NUMBERED = re.compile(r"((?:.*\.)?layers\.)(\d+)\.(.+)")
_BUFFERS = re.compile(r".*(\.expert_bias|inv_freq|_extra_state.*|local_tokens_per_expert)")
_TIED = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
MAX_LAYERS = 4096
_KNOWN_ORDERS: tuple[tuple[str, ...], ...] = (
    ("input_layernorm", "linear_qkv.layer_norm", "linear_proj", "linear_q", "linear_k", "q_layernorm", "k_layernorm",
     "pre_mlp_layernorm", "linear_fc1.layer_norm", "router", "experts", "linear_fc1", "linear_fc2"),
    ("linear_proj", "linear_qkv.layer_norm", "linear_q", "linear_k", "q_layernorm", "k_layernorm",
     "pre_mlp_layernorm", "linear_fc1.layer_norm", "router", "experts", "linear_fc1", "linear_fc2"),
)  # fmt: skip
"""The order of a layer's modules: with norms of their own, and with norms fused into the layers that follow them."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A rank's part of a parameter: the boxes of the weight under ``key`` that it is made of, one after another."""

    key: str
    dtype: str
    boxes: tuple[Box, ...]
    is_copy: bool = False

    @property
    def size(self) -> int:
        return sum(box.size for box in self.boxes)


@dataclass(frozen=True, slots=True)
class _Module:
    """The model's keys in order: before the layers, of each layer, after them."""

    before: tuple[str, ...]
    layers: tuple[tuple[tuple[str, int | None], ...], ...]
    after: tuple[str, ...]
    _boxes: dict[tuple[str, int], dict[tuple[int, ...], list[Box]]] = field(default_factory=dict)

    def boxes(self, weights: Mapping[str, TensorRecord], key: str, axes: int) -> dict[tuple[int, ...], list[Box]]:
        """The boxes of a weight in order, by their offsets on the first ``axes`` dimensions (layers, experts)."""
        if (key, axes) not in self._boxes:
            found: dict[tuple[int, ...], list[Box]] = defaultdict(list)
            for chunk in sorted(weights[key].chunks, key=lambda chunk: chunk.offsets):
                if 0 not in chunk.shape:
                    found[chunk.offsets[:axes]].append(Box(chunk.offsets, chunk.shape))
            self._boxes[key, axes] = found
        return self._boxes[key, axes]


@dataclass(frozen=True, slots=True)
class Stages:
    """One way in which a model may have lain on its model-parallel ranks."""

    weights: Mapping[str, TensorRecord]
    module: _Module
    tp: int
    pp: int
    ep: int
    first: int
    experts: bool | None

    def parameters(self, rank: int, buffers: int) -> Iterator[list[Parameter]]:
        """The parameters of each virtual stage of a rank; ranks count tensor-parallel first, pipeline last."""
        tp, rest = rank % self.tp, rank // self.tp
        ep, pp = rest % self.ep, rest // self.ep
        for chunk in range(self._chunks(buffers)):
            yield self._chunk(tp, ep, pp, chunk, self._chunks(buffers))

    def _chunks(self, buffers: int) -> int:
        return buffers if self.pp > 1 and len(self.module.layers) % (self.pp * buffers) == 0 else 1

    def _chunk(self, tp: int, ep: int, pp: int, chunk: int, chunks: int) -> list[Parameter]:
        start, stop = self._layers(chunk * self.pp + pp, self.pp * chunks)
        found: list[Parameter] = []
        if pp == 0 and chunk == 0:
            found += [self._part(key, None, tp) for key in self.module.before]
        for layer in self.module.layers[start:stop]:
            found += [self._part(key, index, tp) for key, index in layer if not _is_expert(key)]
            found += self._of_experts([entry for entry in layer if _is_expert(entry[0])], tp, ep)
        if pp == self.pp - 1 and chunk == chunks - 1:
            found += [self._part(key, None, tp) for key in self.module.after]
            if self.pp > 1 and self.experts is not True and _TIED in self.weights and _OUTPUT not in self.weights:
                tied = self._part(_TIED, None, tp)
                found.append(Parameter(tied.key, tied.dtype, tied.boxes, True))
        return found

    def _layers(self, stage: int, count: int) -> tuple[int, int]:
        total = len(self.module.layers)
        if self.first and count == self.pp and count > 1:
            each = (total - self.first) // (count - 1)
            return (0, self.first) if stage == 0 else (self.first + (stage - 1) * each, self.first + stage * each)
        each = -(-total // count)
        return min(stage * each, total), min((stage + 1) * each, total)

    def _of_experts(self, entries: Sequence[tuple[str, int | None]], tp: int, ep: int) -> Iterator[Parameter]:
        """Experts one after another, each with all of its parameters."""
        if not entries:
            return
        key, layer = entries[0]
        count = self.weights[key].shape[0 if layer is None else 1] // self.ep
        for expert in range(ep * count, (ep + 1) * count):
            yield from (self._part(key, layer, tp, expert) for key, layer in entries)

    def _part(self, key: str, layer: int | None, tp: int, expert: int | None = None) -> Parameter:
        at = tuple(number for number in (layer, expert) if number is not None)
        boxes = self.module.boxes(self.weights, key, len(at))[at]
        mine = boxes if len(boxes) % self.tp else boxes[tp :: self.tp]
        return Parameter(key, self.weights[key].dtype, tuple(mine), tp > 0 and len(boxes) == 1)


def stages(
    weights: Mapping[str, TensorRecord], arguments: Mapping[str, object], ranks: int, chain: int | None
) -> Iterator[Stages]:
    """The ways in which the weights can have lain on ``ranks`` model-parallel ranks, likely ones first.

    ``chain`` is the optimizer's number in a chain: the first has all but the experts, the others the experts.
    """
    experts = None if chain is None else chain > 0
    trained = {key: record for key, record in weights.items() if _BUFFERS.fullmatch(key) is None}
    first = arguments.get("decoder_first_pipeline_num_layers")
    for tp, ep, pp in _degrees(arguments, ranks, experts):
        for order in (None, *_KNOWN_ORDERS):
            module = _module(trained, order, experts)
            if module is not None:
                yield Stages(trained, module, tp, pp, ep, first if isinstance(first, int) else 0, experts)


def _degrees(arguments: Mapping[str, object], ranks: int, experts: bool | None) -> Iterator[tuple[int, int, int]]:
    """Tensor-, expert- and pipeline-parallel degrees whose product is ``ranks``: those of the arguments, or any."""

    def known(*names: str) -> int | None:
        found = (arguments.get(f"{name}_parallel_size") for name in names)
        return next((size for size in found if isinstance(size, int) and size > 0), None)

    tp, pp = known("tensor_model"), known("pipeline_model")
    ep = known("expert_model") if experts else 1
    if experts:
        tp = known("expert_tensor") or tp
    for one in range(1, ranks + 1):
        for two in range(1, ranks // one + 1):
            three = ranks // (one * two)
            fits = one * two * three == ranks
            if fits and tp in (None, one) and ep in (None, two) and pp in (None, three):
                yield one, two, three


def _module(weights: Mapping[str, TensorRecord], order: Sequence[str] | None, experts: bool | None) -> _Module | None:
    before: list[str] = []
    after: list[str] = []
    layers: dict[int, list[tuple[str, int | None, str]]] = {}
    for key, record in weights.items():
        if experts is not None and experts != _is_expert(key):
            continue
        if match := _STACKED.fullmatch(key):
            if not record.shape or record.shape[0] > MAX_LAYERS:
                return None
            for layer in range(record.shape[0]):
                layers.setdefault(layer, []).append((key, layer, match[2]))
        elif match := _NUMBERED.fullmatch(key):
            layers.setdefault(int(match[2]), []).append((key, None, match[3]))
        else:
            (before if "embedding" in key else after).append(key)
    if sorted(layers) != list(range(len(layers))):
        return None
    rows = [layers[number] for number in range(len(layers))]
    if order is not None:
        for row in rows:
            row.sort(key=lambda entry: _rank(entry[2], order))
        before.sort(key=lambda key: ("word_" not in key, "position" not in key))
        after.sort(key=lambda key: ("final_" not in key, key.endswith("bias")))
    return _Module(tuple(before), tuple(tuple((key, at) for key, at, _ in row) for row in rows), tuple(after))


def _is_expert(key: str) -> bool:
    return ".experts." in key and ".shared_experts." not in key


def _rank(name: str, order: Sequence[str]) -> tuple[int, int]:
    place = next((number for number, part in enumerate(order) if part in name), len(order))
    return place, int(name.endswith("bias"))
