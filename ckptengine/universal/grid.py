"""Regular chunk grids over a tensor's fragments: one contiguous byte range for each chunk wherever that is possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor

TARGET_BYTES = 16 << 20
"""Chunks are at most this large where a tensor can be cut."""

SMALL_BYTES = 1 << 20
"""Contiguous chunks below this size are not worth having for a larger tensor: it is served in assembled ones."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular chunk grid; ``contiguous`` says that each chunk is one byte range of one file, with no padding."""

    shape: tuple[int, ...]
    contiguous: bool


def view_grid(tensor: LogicalTensor, target_bytes: int = TARGET_BYTES) -> Grid:
    """The grid that is fastest to read through: contiguous chunks unless they would be tiny."""
    grid = contiguous_grid(tensor, target_bytes)
    if grid is not None:
        size_bytes = math.prod(grid.shape) * itemsize(tensor.dtype)
        if size_bytes >= min(SMALL_BYTES, tensor.nbytes):
            return grid
    return Grid(even_chunks(tensor.shape, itemsize(tensor.dtype), target_bytes), contiguous=False)


def contiguous_grid(tensor: LogicalTensor, target_bytes: int = TARGET_BYTES) -> Grid | None:
    """A grid whose chunks are each one byte range, none padded; None where fragments allow none.

    Chunk shapes divide every boundary between fragments, so that no chunk crosses one.
    """
    if tensor.size == 0 or not tensor.fragments:
        return None
    if not all(fragment.is_contiguous for fragment in tensor.fragments):
        return None
    base = _common_steps(tensor.shape, tensor.fragments)
    # From the last dimension in which some fragment is wider than a chunk, the ones before must be cut to single rows.
    wider = [d for d in range(len(base)) if any(f.box.shape[d] != base[d] for f in tensor.fragments)]
    cut = wider[-1] if wider else 0
    shape = [1 if d < cut else step for d, step in enumerate(base)]
    item_bytes = itemsize(tensor.dtype)
    for d in range(cut, len(shape)):
        size_bytes = math.prod(shape) * item_bytes
        if size_bytes <= target_bytes:
            break
        wanted = max(1, shape[d] * target_bytes // size_bytes)
        divisor = largest_divisor(shape[d], wanted)
        if divisor * 16 < wanted:  # a prime number of rows: rather one large chunk than a thousand slivers
            break
        shape[d] = divisor
        if divisor > 1:
            break
    return Grid(tuple(shape), contiguous=True)


def even_chunks(shape: Sequence[int], item_bytes: int, target_bytes: int) -> tuple[int, ...]:
    """Chunks of at most ``target_bytes`` (one element at least), of nearly equal size: the last is hardly padded."""
    chunk = [max(1, extent) for extent in shape]
    for d, extent in enumerate(chunk):
        size_bytes = math.prod(chunk) * item_bytes
        if size_bytes <= target_bytes:
            break
        row_bytes = size_bytes // extent
        count = -(-extent // max(1, target_bytes // row_bytes))
        chunk[d] = -(-extent // count)
    return tuple(chunk)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    best = 1
    for candidate in range(1, math.isqrt(number) + 1):
        if number % candidate == 0:
            for divisor in (candidate, number // candidate):
                if best < divisor <= limit:
                    best = divisor
    return best


def chunk_box(index: Sequence[int], chunk: Sequence[int], shape: Sequence[int]) -> Box:
    """The elements of the tensor in one chunk; smaller than the chunk at the edge."""
    offsets = tuple(i * c for i, c in zip(index, chunk, strict=True))
    return Box(offsets, tuple(min(c, n - o) for o, c, n in zip(offsets, chunk, shape, strict=True)))


def chunk_counts(chunk: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Number of chunks in each dimension; 0 where the tensor is empty."""
    return tuple(-(-n // c) for c, n in zip(chunk, shape, strict=True))


def _common_steps(shape: Sequence[int], fragments: Sequence[Fragment]) -> list[int]:
    steps = list(shape)
    for fragment in fragments:
        for d, (offset, extent) in enumerate(zip(fragment.box.offsets, fragment.box.shape, strict=True)):
            steps[d] = math.gcd(steps[d], offset, extent)
    return steps
