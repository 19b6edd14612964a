"""Write the weights as Megatron's legacy ranks: one folder per tensor- and pipeline-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ckptengine.errors import RuleError, UnusableRequest
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.emit import Global, Instance, Tensor, storage_of
from ckptengine.sources.rules.language import Replicated, Rules, Sharded
from ckptengine.sources.rules.parse import load_rules
from ckptengine.sources.stream import stream_boxes, stream_memory_bytes
from ckptengine.sources.torchrecords import small_records
from ckptengine.sources.typed import plain_values
from ckptengine.sources.writer import Document, Job, Target, Unit
from ckptengine.sources.zipwriter import ZipWriter, zip_bytes

_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")
_FIRST = re.compile(r"(language_model\.)?embedding\..*|.*word_embeddings\.weight|.*position_embeddings\.weight")
_PRESET = "megatron-gpt"


class LegacyWriter:
    """Cuts weights over tensor-parallel ranks as rules say, and layers evenly over pipeline stages."""

    def __init__(self, job: Job) -> None:
        layout = job.layout
        beyond = [axis for axis in ("vpp", "ep", "etp", "cp") if getattr(layout, axis) != 1]
        if beyond:
            raise UnusableRequest(f"legacy folders are written for tp and pp only, not with {beyond[0]} > 1")
        self._job = job
        self._tp, self._pp = layout.tp, layout.pp
        plain = plain_values(job)
        self._values: dict[str, Any] = dict(plain) if isinstance(plain, dict) else {}
        self._rules = self._layout_rules() if self._tp > 1 else None
        self._weights = {
            name.removeprefix("model."): name
            for name in job.names
            if name.startswith("model.") and name not in job.aliases
        }
        if not self._weights:
            raise UnusableRequest("there is nothing under model. to write for Megatron; rename the weights with rules")
        numbers = [int(match[2]) for name in self._weights if (match := _LAYER.fullmatch(name))]
        self._layers = 1 + max(numbers, default=-1)
        if self._layers % self._pp:
            raise UnusableRequest(f"{self._layers} layers do not divide into {self._pp} pipeline stages")

    def _layout_rules(self) -> Rules:
        given = self._job.rules
        own = load_rules(given) if isinstance(given, str) else None
        return own if own is not None and any(rule.layout for rule in own.rules) else load_rules(_PRESET)

    def units(self) -> Sequence[Unit]:
        """One per rank."""
        units = []
        for tp in range(self._tp):
            for pp in range(self._pp):
                path = self._path(tp, pp)
                parts = self._parts(tp, pp)
                sizes = [self._nbytes(name, boxes) for _, name, boxes in parts]
                small = small_records(self._value(parts, pp))
                names = [*small, *(f"data/{number}" for number in range(len(parts)))]
                size = zip_bytes(names, [*map(len, small.values()), *sizes])
                tensors = tuple(name for _, name, _ in parts)
                units.append(Unit(path, tensors, sum(sizes), size, stream_memory_bytes(self._job), (path,)))
        return units

    def write(self, unit: Unit, target: Target) -> Document:
        """One rank's file."""
        tp, pp = next((t, p) for t in range(self._tp) for p in range(self._pp) if self._path(t, p) == unit.key)
        parts = self._parts(tp, pp)
        with target.create(unit.key) as sink:
            zipped = ZipWriter(sink)
            for record, data in small_records(self._value(parts, pp)).items():
                zipped.add(record, data)
            for number, (_, name, boxes) in enumerate(parts):
                zipped.begin(f"data/{number}")
                stream_boxes(self._job, [(name, box) for box in boxes], zipped.write, lambda _: None)
            zipped.finish()
        return {}

    def _path(self, tp: int, pp: int) -> str:
        rank = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self._pp > 1 else "")
        return f"iter_{self._job.step or 0:07d}/{rank}/model_optim_rng.pt"

    def _parts(self, tp: int, pp: int) -> list[tuple[str, str, list[Box]]]:
        """(local name, tensor, its boxes one after another) of what a rank holds."""
        per_stage = self._layers // self._pp
        parts = []
        for name, full in self._weights.items():
            match = _LAYER.fullmatch(name)
            if match is not None:
                if int(match[2]) // per_stage != pp:
                    continue
                local = f"{match[1]}{int(match[2]) % per_stage}{match[3]}"
            elif (0 if _FIRST.fullmatch(name) else self._pp - 1) != pp:
                continue
            else:
                local = name
            parts.append((local, full, self._boxes(name, self._job.tensor(full).shape, tp)))
        return parts

    def _boxes(self, name: str, shape: tuple[int, ...], tp: int) -> list[Box]:
        if self._rules is None or not shape:
            return [Box.whole(shape)]
        claim = self._rules.layout_rule(name)
        if claim is None or claim[0].layout is None:
            raise RuleError(f"{name} is to lie on {self._tp} tensor-parallel ranks, and no rule says how it is cut")
        rule = claim[0]
        if rule.pieces is not None:
            raise RuleError(f"{rule.where}: {name} holds fused experts, which are not written to legacy folders")
        if isinstance(rule.layout, Replicated):
            return [Box.whole(shape)]
        if not isinstance(rule.layout, Sharded) or rule.layout.widths is not None or rule.layout.dim >= len(shape):
            raise RuleError(f"{rule.where}: {name} of shape {list(shape)} cannot be cut over {self._tp} ranks by it")
        dim = rule.layout.dim
        widths = [self._rules.value(part, self._values, rule.where) for part in rule.layout.parts]
        widths = [width for width in widths if width]
        unit, rest = divmod(shape[dim], sum(widths) * self._tp)
        if rest or (len(widths) > 1 and dim):
            raise RuleError(f"{rule.where}: {name} of shape {list(shape)} does not divide over {self._tp} ranks")
        boxes, start = [], 0
        for width in widths:
            offsets = tuple(start + tp * width * unit if d == dim else 0 for d in range(len(shape)))
            boxes.append(Box(offsets, tuple(width * unit if d == dim else n for d, n in enumerate(shape))))
            start += width * unit * self._tp
        return boxes

    def _nbytes(self, name: str, boxes: Sequence[Box]) -> int:
        return sum(box.size for box in boxes) * itemsize(self._job.tensor(name).dtype)

    def _value(self, parts: Sequence[tuple[str, str, Sequence[Box]]], pp: int) -> dict[str, Any]:
        model: dict[str, Tensor] = {}
        for number, (local, name, boxes) in enumerate(parts):
            dtype = self._job.tensor(name).dtype
            shape = _joined(boxes)
            storage = storage_of(str(number), dtype, self._nbytes(name, boxes), itemsize(dtype))
            model[local] = Tensor(storage, dtype, shape, row_major_strides(shape))
        return {
            "args": Instance(Global("argparse", "Namespace"), self._arguments()),
            "checkpoint_version": 3.0,
            "iteration": self._job.step or 0,
            "model": model,
        }

    def _arguments(self) -> Mapping[str, Any]:
        known = self._values.get("args")
        arguments = dict(known) if isinstance(known, dict) else {"num_layers": self._layers}
        sizes = {"tensor_model_parallel_size": self._tp, "pipeline_model_parallel_size": self._pp}
        return {**arguments, **sizes, "virtual_pipeline_model_parallel_size": None}


def _joined(boxes: Sequence[Box]) -> tuple[int, ...]:
    """The shape of boxes that follow one another along the dimension in which they differ from the whole."""
    if len(boxes) == 1:
        return boxes[0].shape
    return (sum(box.shape[0] for box in boxes), *boxes[0].shape[1:])
