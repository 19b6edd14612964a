"""Logical tensors and the fragments that cover them: the model every source, plan and view speaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptengine.errors import LayoutError
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import itemsize

MAX_DIMENSIONS = 64
"""What torch and numpy can hold."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of a logical tensor and where its bytes are.

    The element at local index ``i`` of ``box`` (counted from the box's own corner) lies ``sum(i[d] * strides[d])``
    elements after byte ``offset`` of ``file``.  ``strides`` is None for plain row-major order, which is what nearly
    every fragment is; explicit strides say transposed, interleaved or stacked storage without moving a byte.
    Strides may be 0 (a stored scalar repeated), never negative.

    ``file`` is a path relative to the source's own root, with ``/`` between its parts.
    """

    box: Box
    file: str
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def is_contiguous(self) -> bool:
        if self.strides is None:
            return True
        plain = row_major_strides(self.box.shape)
        return all(n <= 1 or a == b for n, a, b in zip(self.box.shape, self.strides, plain, strict=True))

    def span_elements(self) -> int:
        """Elements from the first to the last one touched, both included."""
        if self.box.size == 0:
            return 0
        if self.strides is None:
            return self.box.size
        return 1 + sum((n - 1) * s for n, s in zip(self.box.shape, self.strides, strict=True))

    def part(self, wanted: Box, item_bytes: int) -> Fragment:
        """The fragment of ``wanted``, a box inside this fragment's own box."""
        strides = self.strides if self.strides is not None else row_major_strides(self.box.shape)
        inner = wanted.relative_to(self.box)
        start = sum(o * s for o, s in zip(inner.offsets, strides, strict=True))
        return Fragment(wanted, self.file, self.offset + start * item_bytes, strides)


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as the model means it, independent of any sharding.

    ``digest`` is ``"crc64nvme:<16 hex digits>"`` of the row-major bytes, or None where the source records none.
    ``meta`` holds what the source knows beside (sharding, alias, writer), for display only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fragments: Sequence[Fragment]
    digest: str | None = None
    meta: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.shape) > MAX_DIMENSIONS:
            raise LayoutError(f"tensor {self.name!r} has {len(self.shape)} dimensions; {MAX_DIMENSIONS} are the most")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)
