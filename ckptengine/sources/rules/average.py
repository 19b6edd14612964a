"""Averaged tensors: files whose bytes are the mean of ranges of other files, computed while they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptengine.errors import RuleError, Truncated
from ckptengine.layout.dtypes import itemsize
from ckptengine.sources.port import Files

AVERAGE = ":average/"
_FLOATS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "float16": np.dtype("<f2"),
}


@dataclass(frozen=True, slots=True)
class _Mean:
    dtype: str
    nbytes: int
    parts: tuple[tuple[str, int], ...]


class AveragedFiles:
    """Other files plus means of equally long ranges in them, under names of their own.

    The mean is what frameworks compute: the ranks' values added one after another in the tensor's own precision, then
    divided by their number.
    """

    def __init__(self, base: Files) -> None:
        self._base = base
        self._means: dict[str, _Mean] = {}

    def add(self, dtype: str, nbytes: int, parts: tuple[tuple[str, int], ...]) -> str:
        """The path of the mean of ``nbytes`` bytes at each (file, offset) of ``parts``."""
        if dtype not in _FLOATS and dtype != "bfloat16":
            raise RuleError(f"a tensor of {dtype} cannot be averaged; say replicated for whole numbers")
        path = f"{AVERAGE}{len(self._means)}"
        self._means[path] = _Mean(dtype, nbytes, parts)
        return path

    @property
    def root(self) -> str:
        return self._base.root

    def size(self, path: str) -> int:
        mean = self._means.get(path)
        return self._base.size(path) if mean is None else mean.nbytes

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        mean = self._means.get(path)
        if mean is None:
            return self._base.read(path, offset, nbytes)
        if offset < 0 or nbytes < 0 or offset + nbytes > mean.nbytes:
            raise Truncated(f"{path} of {self.root} has {mean.nbytes} bytes; {offset} to {offset + nbytes} were asked")
        width = itemsize(mean.dtype)
        skip = offset % width
        first, span = offset - skip, -(-(skip + nbytes) // width) * width
        ranges = [self._base.read(file, start + first, span) for file, start in mean.parts]
        return _mean(mean.dtype, ranges)[skip : skip + nbytes]

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        if path not in self._means:
            self._base.read_into(path, offset, view)
            return
        view = view.cast("B")
        view[:] = self.read(path, offset, len(view))

    def exists(self, path: str) -> bool:
        return path in self._means or self._base.exists(path)

    def entries(self, folder: str = "") -> list[str]:
        return self._base.entries(folder)

    def sub(self, folder: str) -> Files:
        return self._base.sub(folder)

    def local_path(self, path: str) -> str | None:
        return None if path in self._means else self._base.local_path(path)

    def close(self) -> None:
        self._base.close()


def _mean(dtype: str, ranges: list[bytes]) -> bytes:
    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            kind = _FLOATS[dtype]
            total: NDArray[Any] = np.frombuffer(ranges[0], kind).copy()
            for data in ranges[1:]:
                total += np.frombuffer(data, kind)
            return bytes((total / kind.type(len(ranges))).astype(kind).tobytes())
        wide = _wide(ranges[0])
        for data in ranges[1:]:
            wide = _rounded(wide + _wide(data))
        return bfloat16(wide / np.float32(len(ranges)))


def bfloat16(values: NDArray[np.float32]) -> bytes:
    """float32 values as bfloat16, rounded to the nearest, ties to even."""
    return (_rounded(values).view("<u4") >> 16).astype("<u2").tobytes()


def _wide(data: bytes) -> NDArray[np.float32]:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = values.view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    quiet = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x00400000)
    return np.where(np.isnan(values), quiet, rounded).astype("<u4").view("<f4")
