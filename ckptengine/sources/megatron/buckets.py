"""The distributed optimizer's states in ``dp_reshardable`` checkpoints: flat buckets per model-parallel rank.

A bucket names no parameter.  Megatron puts a rank's parameters into its buckets in the reverse order of the module,
each from a multiple of `ALIGNMENT` elements on.  Which parameters those are follows from how the weights beside them
are cut; the bounds of what was stored one by one, the buckets' lengths and a sample of the fp32 copies, rounded to the
weights, must all agree with that, else the checkpoint is refused.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptengine.errors import UnreadableFormat
from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.dcp.metadata import Chunk, TensorRecord
from ckptengine.sources.megatron.module_order import Parameter, stages

ALIGNMENT = 64
MAX_CHECKED = 2000
"""Of more slots than these, so many drawn at random are compared with the weights."""

MASTER = "master"
REMEDY = (
    "save with --dist-ckpt-optim-fully-reshardable (distrib_optim_sharding_type fully_reshardable), or leave the "
    "optimizer out with rules='megatron-weights'"
)
_BUCKET = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)"
    r"\.gbuf_idx_(\d+)\.dtype_(.+)\.bucket_idx_(\d+)\.([^.]+)"
)
_DTYPE = re.compile(r"\(?torch\.(\w+)")

Agrees = Callable[["Slot"], bool]
"""Whether the fp32 copies at a slot, rounded, are the weight that lies there."""


@dataclass(slots=True)
class Bucket:
    """One bucket: its length in elements, and the key of each state's tensor."""

    length: int
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the elements of one rank's part of a parameter lie: from ``start`` on in ``bucket``."""

    parameter: Parameter
    bucket: Bucket
    start: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """The buckets of one model-parallel rank, virtual stage and element type."""

    dtype: str
    buckets: tuple[Bucket, ...]


def is_bucket(key: str) -> bool:
    """Whether ``key`` names a bucket of the distributed optimizer."""
    return _BUCKET.fullmatch(key) is not None


def buffers_of(records: Mapping[str, TensorRecord]) -> dict[tuple[int, int], list[Buffer]]:
    """(optimizer of a chain, model-parallel rank) -> its buffers, in order."""
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
        bucket = buckets.setdefault(int(match[5]), Bucket(record.shape[0]))
        bucket.keys[MASTER if match[6] == "param" else match[6]] = key
        if bucket.length != record.shape[0]:
            raise UnreadableFormat(f"the states of a bucket have different lengths at {key!r}; {REMEDY}")
    made: dict[tuple[int, int], list[Buffer]] = {}
    for place_of, buffers in sorted(found.items()):
        rows = []
        for (_, dtype_name), buckets in sorted(buffers.items()):
            rows.append(Buffer(dtype_name, tuple(bucket for _, bucket in sorted(buckets.items()))))
        made[place_of] = rows
    return made


def find_slots(records: Mapping[str, TensorRecord], arguments: Mapping[str, object], agrees: Agrees) -> list[Slot]:
    """Where every part of every trained parameter lies; `UnreadableFormat` where that cannot be known for certain.

    ``arguments`` are those of Megatron where the checkpoint has them: parallel degrees are taken from them.
    """
    weights = {key: record for key, record in records.items() if "optimizer." not in key}
    ranks = buffers_of(records)
    slots: list[Slot] = []
    for chain in sorted({chain for chain, _ in ranks}):
        mine = {rank: buffers for (other, rank), buffers in ranks.items() if other == chain}
        is_chained = len({other for other, _ in ranks}) > 1
        slots += _of_chain(weights, records, mine, arguments, agrees, chain if is_chained else None)
    return slots


def _of_chain(
    weights: Mapping[str, TensorRecord],
    records: Mapping[str, TensorRecord],
    ranks: Mapping[int, Sequence[Buffer]],
    arguments: Mapping[str, object],
    agrees: Agrees,
    chain: int | None,
) -> list[Slot]:
    if sorted(ranks) != list(range(len(ranks))):
        raise UnreadableFormat(f"buckets of a model-parallel rank are missing: there are those of {sorted(ranks)}")
    lengths = {len(buffers) for buffers in ranks.values()}
    if len(lengths) > 1:
        raise UnreadableFormat(f"model-parallel ranks have different numbers of buffers; {REMEDY}")
    for layout in stages(weights, arguments, len(ranks), chain):
        made: list[Slot] = []
        for rank, buffers in ranks.items():
            placed = _place(list(layout.parameters(rank, len(buffers))), buffers, records)
            if placed is None:
                break
            made += placed
        else:
            sample = made if len(made) <= MAX_CHECKED else random.Random(0).sample(made, MAX_CHECKED)
            if all(agrees(slot) for slot in sample):
                return made
    raise UnreadableFormat(
        "the distributed optimizer's buckets (dp_reshardable) do not fit the weights in any order of parameters that "
        f"is known, so its states cannot be named; {REMEDY}"
    )


def _place(
    chunks: Sequence[Sequence[Parameter]], buffers: Sequence[Buffer], records: Mapping[str, TensorRecord]
) -> list[Slot] | None:
    """Slots of the virtual stages' parameters, each stage one buffer for each element type; None where they do not fit.

    Buffers of one stage follow one another in the order in which their types first occur.
    """
    slots: list[Slot] = []
    position = 0
    for parameters in chunks:
        dtypes = list(dict.fromkeys(parameter.dtype for parameter in parameters))
        here = buffers[position : position + len(dtypes)]
        position += len(dtypes)
        if sorted(buffer.dtype for buffer in here) != sorted(dtypes):
            return None
        for buffer in here:
            filled = _fill([p for p in parameters if p.dtype == buffer.dtype][::-1], buffer, records)
            if filled is None:
                return None
            slots += filled
    return slots if position == len(buffers) else None


def _fill(parameters: Sequence[Parameter], buffer: Buffer, records: Mapping[str, TensorRecord]) -> list[Slot] | None:
    slots: list[Slot] = []
    rest = iter(buffer.buckets)
    bucket, end = next(rest, None), 0
    bounds = _bounds(bucket, records)
    for parameter in parameters:
        if bucket is not None and end == bucket.length:
            bucket, end = next(rest, None), 0
            bounds = _bounds(bucket, records)
        if bucket is None:
            return None
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + parameter.size
        if start not in bounds or end not in bounds:  # parameters were stored one by one
            return None
        slots.append(Slot(parameter, bucket, start))
    is_full = bucket is not None and end == bucket.length and next(rest, None) is None
    return slots if is_full else None


def _bounds(bucket: Bucket | None, records: Mapping[str, TensorRecord]) -> set[int]:
    """Where the pieces that were stored of a bucket begin and end."""
    chunks = records[next(iter(bucket.keys.values()))].chunks if bucket is not None else ()
    return {at for c in chunks for at in (c.offsets[0], c.offsets[0] + c.shape[0])}


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
        for box in slot.parameter.boxes:
            for piece in pieces:
                low, high = max(at, piece.offsets[0]), min(at + box.size, piece.offsets[0] + piece.shape[0])
                if low < high:
                    yield from _cut(read(key, piece), low - piece.offsets[0], box, low - at, high - at, dtype)
            at += box.size


def _cut(stored: Fragment, skip: int, box: Box, first: int, last: int, dtype: str) -> Iterator[Fragment]:
    """Elements ``first`` to ``last`` of ``box``, which begin ``skip`` elements into a stored 1-D piece."""
    if not stored.is_contiguous:
        raise UnreadableFormat("a bucket of the distributed optimizer is stored with gaps")
    offset = stored.offset + skip * itemsize(dtype)
    for part in flat_boxes(box.shape, first, last):
        yield Fragment(part.shift(box.offsets), stored.file, offset)
        offset += math.prod(part.shape) * itemsize(dtype)
