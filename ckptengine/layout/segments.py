"""Re-arrangements of one dimension as segments: fused parts, grouped heads, interleavings, padding.

Every function returns the segments that take the *logical* dimension (parts one after another, no padding) to another
arrangement of it, together with that arrangement's extent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` logical indices from ``source`` on that lie at ``target``; a copy where other ranks hold them too."""

    source: int
    target: int
    length: int
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Arranged:
    """A dimension of ``extent`` indices made of segments; what no segment fills is padding."""

    extent: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One sub-parameter of a fused dimension: ``width`` indices, cut only between its ``heads`` equal heads."""

    width: int
    heads: int | None = None

    def __post_init__(self) -> None:
        heads = self.width if self.heads is None else self.heads
        if self.width < 0 or heads < 0 or (heads and self.width % heads) or (self.width and not heads):
            raise LayoutError(f"a part of {self.width} indices cannot have {self.heads} equal heads")


def held_by_rank(parts: Sequence[Part], ranks: int, rank: int) -> Arranged:
    """The local dimension of a tensor-parallel rank: its share of every part, one after another (QKV, gate/up).

    Heads are shared out evenly, the first ranks getting one more where they do not divide.  Where there are fewer
    heads than ranks, each is held by ``ranks / heads`` neighbours, of which the first counts as the original.
    `LayoutError` where that does not divide either.
    """
    segments: list[Segment] = []
    base = target = 0
    for part in parts:
        heads = part.width if part.heads is None else part.heads
        if heads:
            unit = part.width // heads
            first, count, is_copy = _share(heads, ranks, rank)
            if count:
                segments.append(Segment(base + first * unit, target, count * unit, is_copy))
            target += count * unit
        base += part.width
    return Arranged(target, tuple(segments))


def grouped(parts: Sequence[int], groups: int) -> Arranged:
    """Parts interleaved per group (Megatron's QKV: for every query group its queries, then its key, then its value).

    ``parts`` are the widths of the whole parts; each must divide into ``groups``.
    """
    if groups < 1 or any(width % groups for width in parts):
        raise LayoutError(f"parts of widths {list(parts)} do not divide into {groups} groups")
    stride = sum(parts) // groups
    segments: list[Segment] = []
    base = before = 0
    for width in parts:
        unit = width // groups
        segments += [Segment(base + g * unit, g * stride + before, unit) for g in range(groups) if unit]
        base, before = base + width, before + unit
    return Arranged(base, tuple(sorted(segments, key=lambda segment: segment.target)))


def padded(extent: int, multiple: int) -> Arranged:
    """The dimension padded with zeros behind its end to a multiple (vocabularies)."""
    if multiple < 1:
        raise LayoutError(f"cannot pad to a multiple of {multiple}")
    return Arranged(-(-extent // multiple) * multiple, (Segment(0, 0, extent),) if extent else ())


def chunk(extent: int, ranks: int, rank: int) -> Arranged:
    """A plain shard by torch's rule: ``ceil(extent / ranks)`` indices each, late ranks fewer or none."""
    size = -(-extent // ranks)
    first = min(extent, rank * size)
    length = min(size, extent - first)
    return Arranged(length, (Segment(first, 0, length),) if length else ())


def after(first: Arranged, second: Arranged) -> Arranged:
    """``second``, an arrangement of what ``first`` makes, as an arrangement of the logical dimension.

    Padding of the first that the second keeps stays padding.
    """
    segments: list[Segment] = []
    for outer in second.segments:
        for inner in first.segments:
            low = max(outer.source, inner.target)
            length = min(outer.source + outer.length, inner.target + inner.length) - low
            if length > 0:
                source, target = inner.source + low - inner.target, outer.target + low - outer.source
                segments.append(Segment(source, target, length, inner.is_copy or outer.is_copy))
    return Arranged(second.extent, tuple(sorted(segments, key=lambda segment: segment.target)))


def _share(heads: int, ranks: int, rank: int) -> tuple[int, int, bool]:
    """(first head, number of heads, whether another rank is their first holder)."""
    if heads >= ranks:
        each, more = divmod(heads, ranks)
        return rank * each + min(rank, more), each + (rank < more), False
    if ranks % heads:
        raise LayoutError(f"{heads} heads can neither be shared out to {ranks} ranks nor repeated evenly on them")
    return rank // (ranks // heads), 1, rank % (ranks // heads) != 0
