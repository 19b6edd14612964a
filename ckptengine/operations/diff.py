"""Compare two checkpoints, whatever their formats and layouts: by digest first, by value where that does not decide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.operations.digests import blocks
from ckptengine.operations.element_values import as_numbers
from ckptengine.operations.read import BoxReader
from ckptengine.sources.port import Source
from ckptengine.sources.spelled import is_live, spelled

CHUNK_BYTES = 16 << 20
"""Bytes of each side that are held at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """How a tensor that both have differs.

    ``kind`` is ``"dtype"``, ``"shape"`` or ``"values"``.  For values: how many elements differ, the largest absolute
    difference (None where one side is not finite or the type has no numbers) and the index of that element.
    """

    name: str
    kind: str
    a: str
    b: str
    elements: int = 0
    largest: float | None = None
    at: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDifference:
    """A plain value that differs: where it is, and both sides in short (None where a side has nothing there)."""

    path: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Everything in which two checkpoints differ."""

    a: str
    b: str
    tensors: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differing: tuple[TensorDifference, ...]
    values: tuple[ValueDifference, ...]
    by_digest: int
    """Tensors that were found equal by their digests, without reading them."""
    by_value: int
    """Tensors that were read on both sides."""

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.differing or self.values)

    def to_json(self) -> dict[str, Any]:
        """The documented document that ``diff --json`` prints."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "tensors": self.tensors,
            "by_digest": self.by_digest,
            "by_value": self.by_value,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "differing": [
                {
                    "name": d.name,
                    "kind": d.kind,
                    "a": d.a,
                    "b": d.b,
                    "elements": d.elements,
                    "largest": d.largest,
                    "at": None if d.at is None else list(d.at),
                }
                for d in self.differing
            ],
            "values": [{"path": v.path, "a": v.a, "b": v.b} for v in self.values],
        }


def diff(a: Source, b: Source, *, values: bool = True, progress: Progress | None = None) -> Difference:
    """Compare two sources.

    Tensors are equal when their bytes are: a NaN equals itself and -0.0 differs from 0.0 (with a largest difference of
    0).  ``values`` compares what is not a tensor too.  Bounded memory: two chunks.  Where only one of them is ours, its
    names are taken without escapes, as other formats have them.
    """
    if is_live(a) != is_live(b):
        a, b = spelled(a), spelled(b)
    names_a, names_b = set(a.names()), set(b.names())
    both = [name for name in a.names() if name in names_b]
    differing: list[TensorDifference] = []
    counts = {"digest": 0, "value": 0}
    done, total = 0, 0
    pairs = [(a.tensor(name), b.tensor(name)) for name in both] if progress is not None else None
    if pairs is not None:
        total = sum(left.nbytes for left, _ in pairs)
    for position, name in enumerate(both):
        left, right = pairs[position] if pairs is not None else (a.tensor(name), b.tensor(name))
        found = _compare_headers(left, right)
        if found is None and left.digest is not None and left.digest == right.digest:
            counts["digest"] += 1
        elif found is None:
            counts["value"] += 1
            found = _compare_values(a, left, b, right)
        if found is not None:
            differing.append(found)
        done += left.nbytes
        if progress is not None:
            progress(done, total)
    return Difference(
        a=a.files.root,
        b=b.files.root,
        tensors=len(both),
        only_a=tuple(sorted(names_a - names_b)),
        only_b=tuple(sorted(names_b - names_a)),
        differing=tuple(differing),
        values=tuple(_value_differences("", a.values(), b.values())) if values else (),
        by_digest=counts["digest"],
        by_value=counts["value"],
    )


def _compare_headers(a: LogicalTensor, b: LogicalTensor) -> TensorDifference | None:
    if a.shape != b.shape:
        return TensorDifference(name=a.name, kind="shape", a=str(list(a.shape)), b=str(list(b.shape)))
    if a.dtype != b.dtype:
        return TensorDifference(name=a.name, kind="dtype", a=a.dtype, b=b.dtype)
    return None


@dataclass(slots=True)
class _Largest:
    """The largest difference seen so far."""

    elements: int = 0
    value: float | None = None
    at: tuple[int, ...] | None = None
    unordered: bool = False
    numbers: list[str] = field(default_factory=list)

    def see(self, box: Box, a: npt.NDArray[Any], b: npt.NDArray[Any], dtype: str) -> None:
        """Take in one box, given as opaque units on both sides."""
        octets = [side.reshape(-1, 1).view(np.uint8).reshape(side.size, -1) for side in (a, b)]
        where = np.flatnonzero((octets[0] != octets[1]).any(axis=1))
        if not where.size:
            return
        self.elements += int(where.size)
        left, right = (as_numbers(side.reshape(-1)[where], dtype) for side in (a, b))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(left - right)
        finite = np.isfinite(apart)
        self.unordered = self.unordered or not bool(finite.all())
        best = int(np.argmax(np.where(finite, apart, -1.0)))
        value = float(apart[best]) if finite[best] else None
        if self.at is None or (value is not None and (self.value is None or value > self.value)):
            inner = np.unravel_index(int(where[best]), box.shape) if box.shape else ()
            self.at = tuple(int(o + i) for o, i in zip(box.offsets, inner, strict=True))
            self.value = value
            self.numbers = [f"{left[best]:.9g}", f"{right[best]:.9g}"]


def _compare_values(a: Source, left: LogicalTensor, b: Source, right: LogicalTensor) -> TensorDifference | None:
    item_bytes = itemsize(left.dtype)
    unit = np.dtype("V16") if item_bytes == 16 else np.dtype(f"u{item_bytes}")
    readers = BoxReader(a, left), BoxReader(b, right)
    largest = _Largest()
    for box in blocks(left.shape, max(1, CHUNK_BYTES // item_bytes)):
        sides = [np.empty(box.shape, unit) for _ in readers]
        for reader, side in zip(readers, sides, strict=True):
            reader.read(box, side)
        if sides[0].tobytes() != sides[1].tobytes():
            largest.see(box, sides[0], sides[1], left.dtype)
    if not largest.elements:
        return None
    return TensorDifference(
        name=left.name,
        kind="values",
        a=largest.numbers[0],
        b=largest.numbers[1],
        elements=largest.elements,
        largest=largest.value,
        at=largest.at,
    )


def _value_differences(path: str, a: object, b: object) -> Iterable[ValueDifference]:
    """Differences of nested plain values; the kinds of containers that formats mix up (tuple, list) are equal."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                yield ValueDifference(
                    path=below, a=_short(a[key]) if key in a else None, b=_short(b[key]) if key in b else None
                )
            else:
                yield from _value_differences(below, a[key], b[key])
        return
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _value_differences(f"{path}.{index}" if path else str(index), left, right)
        return
    if not _equal(a, b):
        yield ValueDifference(path=path, a=_short(a), b=_short(b))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        left, right = np.asarray(a), np.asarray(b)
        return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    try:
        return bool(a == b)
    except Exception:  # objects of any class may refuse to be compared: their text is what is left
        return repr(a) == repr(b)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
