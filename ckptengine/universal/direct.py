"""A codec pipeline that reads a selection of a view straight into the result, past chunks and their copies.

zarr cuts a selection by chunks, gets each chunk as bytes and copies from there.  Over a checkpoint nothing is encoded,
so the pieces of a rectangular selection are put together again and read as one box into the result: only the bytes that
are needed, once, on several threads.  Any other selection (steps, masks, index arrays) goes zarr's way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import CodecPipeline
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import NDBuffer
from zarr.core.codec_pipeline import BatchedCodecPipeline

from ckptengine.layout.box import Box


class ReadsChunkBoxes(Protocol):
    """The store under the arrays that this pipeline serves."""

    def origin(self, key: str) -> tuple[int, ...] | None:
        """The first element of the chunk under ``key`` in its tensor; None where there is no such chunk."""
        ...

    def read_box(self, key: str, box: Box, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with a box of the tensor that the chunk under ``key`` belongs to."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of the tensor and the box of the result that it fills; both have as many elements."""

    key: str
    box: Box
    out: Box
    kept: tuple[bool, ...]  # dimensions of the tensor that the result has


class DirectPipeline(BatchedCodecPipeline):
    """`BatchedCodecPipeline` that reads rectangular selections as boxes."""

    @classmethod
    def over(cls, pipeline: CodecPipeline) -> CodecPipeline:
        """The same pipeline with direct reads, or the given one where it is not of the expected kind."""
        if type(pipeline) is not BatchedCodecPipeline:
            return pipeline
        return cls(**{field.name: getattr(pipeline, field.name) for field in fields(pipeline)})

    async def read(
        self,
        batch_info: Iterable[tuple[Any, ArraySpec, Any, Any, bool]],
        out: NDBuffer,
        drop_axes: tuple[int, ...] = (),
    ) -> Any:
        batch = list(batch_info)
        target = out.as_ndarray_like()
        parts = _parts(batch, target) if isinstance(target, np.ndarray) and not drop_axes else None
        if not parts:
            return await super().read(batch, out, drop_axes)
        store: ReadsChunkBoxes = batch[0][0].store
        await asyncio.to_thread(_read_all, store, _merged(parts), target)
        return None


def _read_all(store: ReadsChunkBoxes, parts: Sequence[_Part], target: Any) -> None:
    for part in parts:
        ranges = tuple(slice(o, e) for o, e in zip(part.out.offsets, part.out.ends, strict=True))
        view = target[ranges] if ranges else target
        # Dimensions that an integer took away come back with extent 1; inserting those never copies.
        index = tuple(slice(None) if kept else np.newaxis for kept in part.kept)
        store.read_box(part.key, part.box, view[index] if part.kept else view)


def _parts(batch: Sequence[tuple[Any, ArraySpec, Any, Any, bool]], target: npt.NDArray[Any]) -> list[_Part] | None:
    """The selection as boxes, or None where it is not rectangular."""
    parts: list[_Part] = []
    for getter, _, chunk_selection, out_selection, _ in batch:
        origin = getter.store.origin(getter.path)
        if origin is None:
            return None
        chosen = _ranges(chunk_selection, len(origin), allow_integers=True)
        filled = _ranges(out_selection, target.ndim, allow_integers=False)
        if chosen is None or filled is None:
            return None
        kept = tuple(not taken for _, _, taken in chosen)
        starts = tuple(o + start for o, (start, _, _) in zip(origin, chosen, strict=True))
        box = Box(starts, tuple(n for _, n, _ in chosen))
        out = Box(tuple(start for start, _, _ in filled), tuple(n for _, n, _ in filled))
        if tuple(n for n, k in zip(box.shape, kept, strict=True) if k) != out.shape:
            return None
        parts.append(_Part(getter.path, box, out, kept))
    return parts


def _ranges(selection: Any, ndim: int, *, allow_integers: bool) -> list[tuple[int, int, bool]] | None:
    """(start, extent, was an integer) for each dimension, or None for anything but plain ranges and integers."""
    items = selection if isinstance(selection, tuple) else (selection,)
    if len(items) != ndim:
        return None
    found: list[tuple[int, int, bool]] = []
    for item in items:
        if isinstance(item, int | np.integer) and allow_integers:
            found.append((int(item), 1, True))
        elif isinstance(item, slice) and item.step in (None, 1) and item.start is not None and item.stop is not None:
            if not 0 <= item.start <= item.stop:
                return None
            found.append((int(item.start), int(item.stop - item.start), False))
        else:
            return None
    return found


def _merged(parts: list[_Part]) -> list[_Part]:
    """One part where all of them together are one box that lands in one box, else the parts as they are."""
    first = parts[0]
    low = tuple(min(column) for column in zip(*(p.box.offsets for p in parts), strict=True))
    high = tuple(max(column) for column in zip(*(p.box.ends for p in parts), strict=True))
    whole = Box(low, tuple(b - a for a, b in zip(low, high, strict=True)))
    same_kept = all(p.kept == first.kept for p in parts)
    deltas = {_delta(p) for p in parts}
    if len(parts) == 1 or not same_kept or len(deltas) != 1 or sum(p.box.size for p in parts) != whole.size:
        return parts
    (delta,) = deltas
    kept = [d for d, k in enumerate(first.kept) if k]
    at = tuple(whole.offsets[d] + moved for d, moved in zip(kept, delta, strict=True))
    return [_Part(first.key, whole, Box(at, tuple(whole.shape[d] for d in kept)), first.kept)]


def _delta(part: _Part) -> tuple[int, ...]:
    kept = [o for o, k in zip(part.box.offsets, part.kept, strict=True) if k]
    return tuple(b - a for a, b in zip(kept, part.out.offsets, strict=True))
