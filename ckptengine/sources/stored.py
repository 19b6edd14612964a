"""Tensors of torch's pickles, known by where their bytes lie; nothing is read until it is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ckptengine.errors import Damaged, UnreadableFormat
from ckptengine.layout.box import Box, row_major_strides
from ckptengine.layout.dtypes import ITEMSIZE, itemsize
from ckptengine.layout.tensor import Fragment
from ckptengine.sources.port import Files

NUMPY_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ITEMSIZE
    if name not in ("bfloat16", "complex32") and not name.startswith(("float8", "float4"))
}
"""Element types that numpy has too."""


MAX_EXPANDED_BYTES = 1 << 30
"""Up to this size a tensor may repeat few stored elements (``expand``) as often as it likes."""
MAX_EXPANSION = 1 << 10
"""How many times the stored bytes a larger one may have."""


class Dtype(str):
    """A ``torch.dtype``: its name without ``torch.``."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class StoredStorage:
    """A storage: ``nbytes`` bytes that ``locate`` finds in a file (path and absolute offset) when they are needed.

    ``dtype`` is None for an untyped storage.
    """

    key: str
    dtype: str | None
    nbytes: int
    locate: Callable[[], tuple[str, int]] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A strided tensor over a storage.  ``start`` and ``strides`` count elements.

    Raises `Damaged` when the storage is too small for it.
    """

    storage: StoredStorage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.start, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise UnreadableFormat(
                f"a tensor of shape {self.shape} with strides {self.strides} at {self.start} makes no sense"
            )
        last = self.start + (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)))
        if self.size and last * itemsize(self.dtype) > self.storage.nbytes:
            raise Damaged(
                f"a tensor of {self.dtype} {list(self.shape)} reaches beyond its storage {self.storage.key!r} of "
                f"{self.storage.nbytes} bytes"
            )

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * itemsize(self.dtype)

    @property
    def is_contiguous(self) -> bool:
        plain = row_major_strides(self.shape)
        return self.size == 0 or all(n == 1 or a == b for n, a, b in zip(self.shape, self.strides, plain, strict=True))

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two tensors that are the same elements of the same storage."""
        return (id(self.storage), self.dtype, self.start, self.shape, self.strides)

    def at(self, start: int = 0) -> tuple[str, int]:
        """The file and the absolute byte offset of the element ``start`` elements after the tensor's first."""
        file, offset = self.storage.locate()
        return file, offset + (self.start + start) * itemsize(self.dtype)

    def fragment(self, offsets: tuple[int, ...] | None = None) -> Fragment:
        """The whole tensor as one fragment whose box begins at ``offsets`` (default: zeros)."""
        self._check_proportion()
        file, offset = self.at()
        box = Box(offsets if offsets is not None else (0,) * len(self.shape), self.shape)
        return Fragment(box, file, offset, None if self.is_contiguous else self.strides)

    def _check_proportion(self) -> None:
        """`UnreadableFormat` for a tensor that was expanded to what nobody could read or store."""
        held = itemsize(self.dtype) * (1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)))
        if self.nbytes > MAX_EXPANDED_BYTES and self.nbytes > MAX_EXPANSION * held:
            raise UnreadableFormat(
                f"a tensor of {self.dtype} {list(self.shape)} repeats {held} stored bytes to {self.nbytes}; save "
                "what it was expanded from instead, and expand that after it is loaded"
            )

    def read(self, files: Files) -> bytes:
        """The row-major bytes."""
        if not self.size:
            return b""
        self._check_proportion()
        width = itemsize(self.dtype)
        file, offset = self.at()
        if self.is_contiguous:
            return files.read(file, offset, self.nbytes)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        raw = np.frombuffer(files.read(file, offset, span * width), np.dtype((np.void, width)))
        steps = tuple(stride * width for stride in self.strides)
        return np.lib.stride_tricks.as_strided(raw, self.shape, steps).tobytes()

    def to_numpy(self, files: Files) -> np.ndarray:
        """The elements; bfloat16 as float32.  `UnreadableFormat` for types that numpy lacks."""
        raw = self.read(files)
        if self.dtype == "bfloat16":
            wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        if self.dtype not in NUMPY_DTYPES:
            raise UnreadableFormat(f"numpy has no {self.dtype}")
        return np.frombuffer(raw, NUMPY_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """A numpy array that a pickle holds by value."""

    data: bytes
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool = False

    def to_numpy(self) -> np.ndarray:
        """The elements (read-only); `Damaged` when there are too few bytes."""
        if math.prod(self.shape) * self.dtype.itemsize != len(self.data):
            raise Damaged(f"a numpy array of {self.dtype} {list(self.shape)} has {len(self.data)} bytes")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")


def plain_storage(key: str, dtype: str | None, numel: object, locate: Callable[[], tuple[str, int]]) -> StoredStorage:
    """A storage as torch's persistent ids describe it: ``numel`` counts elements, or bytes when untyped."""
    if type(numel) is not int or numel < 0:
        raise UnreadableFormat(f"storage {key!r} has a size of {numel!r}")
    return StoredStorage(key, dtype, numel * (itemsize(dtype) if dtype else 1), locate)
