"""The distributed optimizer's states in buckets, which name no parameter: ``dp_reshardable`` and its predecessors.

Megatron puts a rank's parameters into its buckets in the reverse order of the module, each from a multiple of 64
elements on.  Which parameters those are follows from how the weights beside them are cut; the bounds of what was stored
one by one, the buckets' lengths and a sample of the fp32 copies, rounded to the weights, must all agree with that, else
the checkpoint is refused.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckptengine.errors import UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.dcp.metadata import Chunk, TensorRecord
from ckptengine.sources.megatron.module_order import TIED, Degrees, Model, Parameter, models
from ckptengine.sources.megatron.stages import Bucket, Buffer, Dealing, Ranks, Slot, align

MAX_CHECKED = 2000
"""Of more slots than these, so many drawn at random are compared with the weights."""

MASTER = "master"
REMEDY = (
    "save with --dist-ckpt-optim-fully-reshardable (distrib_optim_sharding_type fully_reshardable), or leave the "
    "optimizer out with rules='megatron-weights'"
)
_BUCKET = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)"
    r"\.gbuf_idx_(\d+)\.dtype_(.+?)(?:\.bucket_idx_(\d+))?\.([^.]+)"
)
_DTYPE = re.compile(r"\(?torch\.(\w+)")

Agrees = Callable[[Slot], bool]
"""Whether the fp32 copies at a slot, rounded, are the weight that lies there."""


def is_bucket(key: str) -> bool:
    """Whether ``key`` names a bucket of the distributed optimizer."""
    return _BUCKET.fullmatch(key) is not None


def buffers_of(records: Mapping[str, TensorRecord]) -> dict[int, dict[int, list[Buffer]]]:
    """The buffers of each model-parallel rank, in order, for each optimizer of a chain.

    A buffer without numbered buckets is one that was put together from several, without the gaps between them.
    """
    found: dict[tuple[int, int], dict[tuple[int, str], dict[int, Bucket]]] = {}
    for key, record in records.items():
        match = _BUCKET.fullmatch(key)
        if match is None:
            continue
        dtype = _DTYPE.match(match[4])
        if dtype is None or len(record.shape) != 1:
            raise UnreadableFormat(f"the buffer {key!r} of the distributed optimizer is not known; {REMEDY}")
        place = found.setdefault((int(match[1] or 0), int(match[2])), {})
        buckets = place.setdefault((int(match[3]), dtype[1]), {})
        bucket = buckets.setdefault(int(match[5] or 0), Bucket(record.shape[0]))
        if match[5] is not None and not bucket.keys:
            bucket.add_bounds(record.chunks)
        bucket.keys[MASTER if match[6] == "param" else match[6]] = key
        if bucket.length != record.shape[0]:
            raise UnreadableFormat(f"the states of a bucket have different lengths at {key!r}; {REMEDY}")
    made: dict[int, dict[int, list[Buffer]]] = {}
    for (chain, rank), buffers in sorted(found.items()):
        rows = []
        for (_, dtype_name), buckets in sorted(buffers.items()):
            rows.append(Buffer(dtype_name, tuple(bucket for _, bucket in sorted(buckets.items()))))
        made.setdefault(chain, {})[rank] = rows
    return made


def find_slots(
    records: Mapping[str, TensorRecord],
    arguments: Mapping[str, object],
    agrees: Agrees,
    experts: Mapping[int, bool],
) -> list[Slot]:
    """Where every part of every trained parameter lies; `UnreadableFormat` where that cannot be known for certain.

    ``arguments`` are those of Megatron where the checkpoint has them: parallel degrees are taken from them.
    ``experts``: which optimizers of a chain train parallel experts; elsewhere all but the first do.
    """
    weights = {key: record for key, record in records.items() if "optimizer." not in key}
    chains = buffers_of(records)
    together: dict[bool, dict[int, list[Buffer]]] = {}
    for chain, ranks in chains.items():  # others than those of experts follow each other, stage by stage
        for rank, buffers in ranks.items():
            together.setdefault(experts.get(chain, chain > 0), {}).setdefault(rank, []).extend(buffers)
    slots: list[Slot] = []
    for is_experts, ranks in together.items():
        slots += _of_chain(weights, ranks, arguments, agrees, is_experts if len(together) > 1 else None)
    return slots


def _of_chain(
    weights: Mapping[str, TensorRecord],
    ranks: Ranks,
    arguments: Mapping[str, object],
    agrees: Agrees,
    experts: bool | None,
) -> list[Slot]:
    degrees = list(_degrees(arguments, 1 + max(ranks), experts))
    chunks = _known(arguments, "virtual_pipeline_model") if "pipeline_model_parallel_size" in arguments else None
    widest = max(len(buffers) for buffers in ranks.values())
    candidates = [(model, each) for model in models(weights, experts) for each in degrees]
    for model, each in candidates:
        counts = [chunks or 1] if "pipeline_model_parallel_size" in arguments else range(1, widest + 1)
        for count in counts if each.pp > 1 else (1,):
            for slots in Dealing(model, each, count, ranks):
                sample = slots if len(slots) <= MAX_CHECKED else random.Random(0).sample(slots, MAX_CHECKED)
                if all(map(agrees, sample)):
                    return slots
    for model, each in candidates:  # with parameters that are not trained
        found = _aligned(model, each, ranks, agrees)
        if found is not None:
            return found
    raise UnreadableFormat(
        "the distributed optimizer's buckets (dp_reshardable) do not fit the weights in any order of parameters that "
        f"is known, so its states cannot be named; {REMEDY}"
    )


def _aligned(model: Model, degrees: Degrees, ranks: Ranks, agrees: Agrees) -> list[Slot] | None:
    """Slots where only some parameters are trained, told by their contents; None where that leaves any doubt."""
    slots: list[Slot] = []
    for pp in range(degrees.pp):
        for rank, tp, ep in degrees.ranks(pp):
            order = [p for block in range(len(model.blocks)) for p in model.parameters(block, tp, ep, degrees)]
            if pp and TIED in model.weights and any(after for _, after in model.copies):
                order.append(replace(model.part(TIED, None, tp, degrees.tp), is_copy=True))
            for buffer in ranks.get(rank, ()):
                found = align([p for p in order if p.dtype == buffer.dtype][::-1], buffer, agrees)
                if found is None:
                    return None
                slots += found
    held = Counter((slot.parameter.key, box) for slot in slots for box in slot.parameter.boxes)
    twice = {key for (key, _), count in held.items() if count > 1} - {TIED}
    replicas = {slot.parameter.key for slot in slots if slot.parameter.is_copy}
    parts: dict[str, set[Box]] = defaultdict(set)
    for key, box in held:
        parts[key].add(box)
    partly = [key for key, boxes in parts.items() if len(boxes) < len({c.offsets for c in model.weights[key].chunks})]
    return None if twice - replicas or partly else slots


def _degrees(arguments: Mapping[str, object], ranks: int, experts: bool | None) -> Iterator[Degrees]:
    """Degrees for at least so many ranks: those of the arguments, or any with that product."""
    tp, pp = _known(arguments, "tensor_model"), _known(arguments, "pipeline_model")
    ep = _known(arguments, "expert_model") if experts else 1
    if experts:
        tp = _known(arguments, "expert_tensor") or tp
    if tp and pp and ep:
        yield Degrees(tp, ep, pp)
        return
    for one in range(1, ranks + 1):
        for two in range(1, ranks // one + 1):
            three = ranks // (one * two)
            fits = one * two * three == ranks
            if fits and tp in (None, one) and ep in (None, two) and pp in (None, three):
                yield Degrees(one, two, three)


def _known(arguments: Mapping[str, object], axis: str) -> int | None:
    size = arguments.get(f"{axis}_parallel_size")
    return size if isinstance(size, int) and size > 0 else None


def state_fragments(
    dtype: str,
    slots: Sequence[Slot],
    state: str,
    read: Callable[[str, Chunk], Fragment],
    records: Mapping[str, TensorRecord],
) -> Iterator[Fragment]:
    """The boxes of a parameter's state that the buckets hold; ``read`` gives where a stored piece lies."""
    for slot in slots:
        key = slot.bucket.keys.get(state)
        if key is None:
            continue
        at = slot.start
        pieces = sorted((c for c in records[key].chunks if c.shape[0]), key=lambda c: c.offsets[0])
        begins = [c.offsets[0] for c in pieces]
        pieces = pieces[max(0, bisect_right(begins, at) - 1) : bisect_right(begins, at + slot.parameter.size)]
        cut = turned if slot.parameter.is_turned else straight
        for boxes in _side_by_side(slot.parameter):
            size = sum(box.size for box in boxes)
            for piece in pieces:
                low, high = max(at, piece.offsets[0]), min(at + size, piece.offsets[0] + piece.shape[0])
                if low < high:
                    stored = read(key, piece)
                    if not stored.is_contiguous:
                        raise UnreadableFormat("a bucket of the distributed optimizer is stored with gaps")
                    offset = stored.offset + (low - piece.offsets[0]) * itemsize(dtype)
                    yield from cut(boxes, low - at, high - at, stored.file, offset, itemsize(dtype))
            at += size


def _side_by_side(parameter: Parameter) -> list[list[Box]]:
    """The boxes of a parameter, those together that lie beside one another in memory."""
    if not parameter.is_turned:
        return [[box] for box in parameter.boxes]
    found: dict[tuple[int, ...], list[Box]] = {}
    for box in parameter.boxes:
        found.setdefault(box.offsets[:-2], []).append(box)
    return list(found.values())


def straight(boxes: Sequence[Box], first: int, last: int, file: str, offset: int, width: int) -> Iterator[Fragment]:
    """Elements ``first`` to ``last`` of one box, which lie in order from ``offset`` on."""
    (box,) = boxes
    for part in flat_boxes(box.shape, first, last):
        yield Fragment(part.shift(box.offsets), file, offset)
        offset += math.prod(part.shape) * width


def turned(boxes: Sequence[Box], first: int, last: int, file: str, offset: int, width: int) -> Iterator[Fragment]:
    """Elements ``first`` to ``last`` of matrices that lie side by side, the last dimension of all of them outermost."""
    row = sum(box.shape[-2] for box in boxes)
    whole = range(-(-first // row), last // row)
    cuts = [(first, last)] if whole.stop < whole.start else [(first, whole.start * row), (whole.stop * row, last)]
    column = 0
    for box in boxes:
        rows, ahead = box.shape[-2], box.offsets[:-2]
        if whole:
            part = Box((*ahead, box.offsets[-2], box.offsets[-1] + whole.start), (*box.shape[:-1], len(whole)))
            at = offset + (whole.start * row + column - first) * width
            yield Fragment(part, file, at, (*(0 for _ in ahead), 1, row))
        for low, high in cuts:
            line = low // row
            begin, end = max(low - line * row, column), min(high - line * row, column + rows)
            if begin < end:
                corner = (*ahead, box.offsets[-2] + begin - column, box.offsets[-1] + line)
                part = Box(corner, (*(1 for _ in ahead), end - begin, 1))
                yield Fragment(part, file, offset + (line * row + begin - first) * width)
        column += rows
