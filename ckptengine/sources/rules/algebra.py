"""Operations on a tensor's fragments that move no byte: concatenate, cut, re-order, transpose, stack.

Pure.  Every function takes and gives `Placed` tensors: a shape and the fragments that cover it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptengine.errors import RuleError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.flat import flat_boxes
from ckptengine.layout.tensor import Fragment


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor without a name: its element type, its shape, and the fragments that cover it."""

    dtype: str
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` indices of one dimension that start at ``source`` and go to ``target``."""

    source: int
    target: int
    length: int


def remap(tensor: Placed, dim: int, extent: int, segments: Iterable[Segment]) -> Placed:
    """The tensor whose dimension ``dim`` has ``extent`` indices, taken from the old ones as ``segments`` say.

    Indices that no segment takes are left out; the caller makes sure that the targets are covered.
    """
    item_bytes = itemsize(tensor.dtype)
    found: list[Fragment] = []
    for segment in segments:
        window = _slab(tensor.shape, dim, segment.source, segment.length)
        delta = tuple(segment.target - segment.source if d == dim else 0 for d in range(len(tensor.shape)))
        for fragment in tensor.fragments:
            common = fragment.box.intersect(window)
            if common is not None:
                part = fragment.part(common, item_bytes) if common != fragment.box else fragment
                found.append(Fragment(common.shift(delta), part.file, part.offset, part.strides))
    return Placed(tensor.dtype, _replaced(tensor.shape, dim, extent), tuple(found))


def narrow(tensor: Placed, dim: int, start: int, length: int) -> Placed:
    """The indices ``start <= i < start + length`` of one dimension."""
    return remap(tensor, dim, length, [Segment(start, 0, length)])


def concatenate(tensors: Sequence[Placed], dim: int) -> Placed:
    """The tensors one after another along ``dim``; they agree in everything else."""
    offset = 0
    found: list[Fragment] = []
    for tensor in tensors:
        delta = tuple(offset if d == dim else 0 for d in range(len(tensor.shape)))
        found += [Fragment(f.box.shift(delta), f.file, f.offset, f.strides) for f in tensor.fragments]
        offset += tensor.shape[dim]
    return Placed(tensors[0].dtype, _replaced(tensors[0].shape, dim, offset), tuple(found))


def transpose(tensor: Placed, order: Sequence[int]) -> Placed:
    """Dimension ``d`` of the result is dimension ``order[d]`` of the tensor."""

    def pick(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values[d] for d in order)

    found: list[Fragment] = []
    for fragment in tensor.fragments:
        strides = fragment.strides if fragment.strides is not None else row_major_strides(fragment.box.shape)
        box = Box(pick(fragment.box.offsets), pick(fragment.box.shape))
        found.append(Fragment(box, fragment.file, fragment.offset, pick(strides)))
    return Placed(tensor.dtype, pick(tensor.shape), tuple(found))


def index(tensor: Placed, dim: int, at: int) -> Placed:
    """The tensor of one dimension less at index ``at`` of ``dim``."""
    row = narrow(tensor, dim, at, 1)
    found = []
    for fragment in row.fragments:
        box = Box(_without(fragment.box.offsets, dim), _without(fragment.box.shape, dim))
        strides = None if fragment.strides is None else _without(fragment.strides, dim)
        found.append(Fragment(box, fragment.file, fragment.offset, strides))
    return Placed(tensor.dtype, _without(tensor.shape, dim), tuple(found))


def stack(tensors: Sequence[Placed]) -> Placed:
    """The tensors, all of one shape, on a new leading dimension."""
    found: list[Fragment] = []
    for number, tensor in enumerate(tensors):
        for fragment in tensor.fragments:
            box = Box((number, *fragment.box.offsets), (1, *fragment.box.shape))
            strides = None if fragment.strides is None else (0, *fragment.strides)
            found.append(Fragment(box, fragment.file, fragment.offset, strides))
    return Placed(tensors[0].dtype, (len(tensors), *tensors[0].shape), tuple(found))


def reshape(tensor: Placed, shape: tuple[int, ...]) -> Placed:
    """The same elements in the same row-major order under another shape; as many of them."""
    item_bytes = itemsize(tensor.dtype)
    found: list[Fragment] = []
    for fragment in tensor.fragments:
        for run in runs(fragment, tensor.shape, item_bytes):
            offset = run.offset
            for box in flat_boxes(shape, run.start, run.start + run.length):
                found.append(Fragment(box, fragment.file, offset))
                offset += box.size * item_bytes
    return Placed(tensor.dtype, shape, tuple(found))


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` elements at byte ``offset`` that are elements ``start`` and on of the flattened tensor."""

    start: int
    length: int
    offset: int


def runs(fragment: Fragment, shape: tuple[int, ...], item_bytes: int) -> list[Run]:
    """The runs of a fragment that are contiguous both in its file and in the flattened tensor."""
    box = fragment.box
    strides = row_major_strides(shape)
    stored = fragment.strides if fragment.strides is not None else row_major_strides(box.shape)
    inner = len(shape)  # dimensions from here on are one run
    length = 1
    while inner and (stored[inner - 1] == length or box.shape[inner - 1] == 1) and length == strides[inner - 1]:
        inner -= 1
        length *= box.shape[inner]
    found: list[Run] = []
    for index in itertools.product(*map(range, box.shape[:inner])):
        at = (*(o + i for o, i in zip(box.offsets, index, strict=False)), *box.offsets[inner:])
        start = sum(a * s for a, s in zip(at, strides, strict=True))
        skip = sum(i * s for i, s in zip(index, stored, strict=False))
        found.append(Run(start, length, fragment.offset + skip * item_bytes))
    return found


def grouped(extent: int, widths: Sequence[int], groups: int) -> list[list[Segment]]:
    """Where the parts of a fused dimension lie: for each part its segments, targets counted from the part's start.

    The dimension holds ``groups`` equal groups, and each of them one run of every part; ``widths`` are the parts'
    relative widths.  ``groups`` 1 means that the parts simply follow one another.
    """
    total = sum(widths)
    if min(widths) < 0 or groups < 1 or not total or extent % (total * groups):
        raise RuleError(f"{extent} indices cannot be divided into {groups} group(s) of parts {list(widths)}")
    unit = extent // (total * groups)
    parts: list[list[Segment]] = []
    start = 0
    for width in widths:
        length = width * unit
        parts.append([Segment((g * total + start) * unit, g * length, length) for g in range(groups)])
        start += width
    return parts


def regrouped(extent: int, widths: Sequence[int], before: int, after: int) -> list[Segment]:
    """A fused dimension of ``before`` groups, each one run of every part, put in order as ``after`` such groups."""
    found: list[Segment] = []
    for old, new in zip(grouped(extent, widths, before), grouped(extent, widths, after), strict=True):
        for one, other in itertools.product(old, new):
            low = max(one.target, other.target)
            high = min(one.target + one.length, other.target + other.length)
            if low < high:
                found.append(Segment(one.source + low - one.target, other.source + low - other.target, high - low))
    return found


def _slab(shape: tuple[int, ...], dim: int, start: int, length: int) -> Box:
    return Box(_replaced((0,) * len(shape), dim, start), _replaced(shape, dim, length))


def _replaced(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _without(values: tuple[int, ...], at: int) -> tuple[int, ...]:
    return (*values[:at], *values[at + 1 :])
