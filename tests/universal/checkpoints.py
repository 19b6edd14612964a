"""Checkpoints in a folder, made of plain files and fragments over them, with exact contents."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ckptengine.layout.box import Box
from ckptengine.layout.dtypes import itemsize
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.files import LocalFiles


class FolderSource:
    """Tensors given by hand over the files of a folder."""

    format = "handmade"

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[LogicalTensor],
        values: object = None,
        aliases: Mapping[str, str] | None = None,
        step: int | None = 7,
    ) -> None:
        self.files = LocalFiles(str(folder))
        self.step = step
        self.metrics: dict[str, float] = {"loss": 0.5}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._values: object = {} if values is None else values
        self._aliases = dict(aliases or {})
        self.built: list[str] = []

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> LogicalTensor:
        self.built.append(name)
        return self._tensors[name]

    def aliases(self) -> dict[str, str]:
        return self._aliases

    def values(self) -> object:
        return self._values


def content(dtype: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Exact bits for a tensor of any dtype: units that each differ, valid for bool."""
    size = math.prod(shape)
    item = itemsize(dtype)
    if dtype == "bool":
        return (np.arange(size) % 3 == seed % 3).view("u1").reshape(shape)
    octets = np.random.default_rng(seed + size).integers(0, 256, size * item, dtype=np.uint8)
    unit = np.dtype("V16") if item == 16 else np.dtype(f"u{item}")
    return octets.view(unit).reshape(shape)


def stored(folder: Path, name: str, dtype: str, array: np.ndarray, boxes: Sequence[Box]) -> LogicalTensor:
    """A tensor whose boxes lie one after another in a file of its own, three bytes in."""
    file = f"{zlib.crc32(f'{name} {dtype}'.encode())}.bin"
    fragments, body = [], bytearray(b"\xee\xee\xee")
    for box in boxes:
        fragments.append(Fragment(box, file, len(body)))
        part = array[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
        body += np.ascontiguousarray(part).tobytes()
    if not (folder / file).exists() or (folder / file).read_bytes() != body:
        (folder / file).write_bytes(bytes(body))
    return LogicalTensor(name, dtype, array.shape, fragments)


def whole(folder: Path, name: str, dtype: str, array: np.ndarray) -> LogicalTensor:
    """A tensor in one piece."""
    return stored(folder, name, dtype, array, [Box.whole(array.shape)])
