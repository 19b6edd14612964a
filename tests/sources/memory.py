"""A source in memory, its tensors stored as they are in one file each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptengine.errors import NotFound
from ckptengine.layout.box import Box
from ckptengine.layout.tensor import Fragment, LogicalTensor
from ckptengine.sources.port import Files
from ckptengine.sources.rules.algebra import Placed


class MemoryFiles:
    """Byte strings as files."""

    def __init__(self, blobs: dict[str, bytes] | None = None) -> None:
        self.blobs = blobs if blobs is not None else {}
        self.root = "memory"

    def size(self, path: str) -> int:
        return len(self.blobs[path])

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        data = self.blobs[path][offset : offset + nbytes]
        assert len(data) == nbytes, f"{path} ends before {offset + nbytes}"
        return data

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        view[:] = self.read(path, offset, len(view))

    def exists(self, path: str) -> bool:
        return path in self.blobs

    def entries(self, folder: str = "") -> list[str]:
        return sorted(self.blobs)

    def sub(self, folder: str) -> Files:
        return self

    def local_path(self, path: str) -> str | None:
        return None

    def close(self) -> None: ...


class MemorySource:
    """Arrays as a checkpoint."""

    format = "memory"
    step = 1

    def __init__(self, arrays: Mapping[str, np.ndarray], values: Any = None) -> None:
        self.metrics: Mapping[str, float] = {}
        self.files = MemoryFiles()
        self._placed = {name: stored(self.files, name, array) for name, array in arrays.items()}
        self._values = values

    def names(self) -> Sequence[str]:
        return list(self._placed)

    def tensor(self, name: str) -> LogicalTensor:
        if name not in self._placed:
            raise NotFound(name)
        placed = self._placed[name]
        return LogicalTensor(name, placed.dtype, placed.shape, placed.fragments)

    def aliases(self) -> Mapping[str, str]:
        return {}

    def values(self) -> object:
        return self._values


def stored(files: MemoryFiles, path: str, array: np.ndarray) -> Placed:
    """Put an array into a file of its own."""
    files.blobs[path] = array.tobytes()
    return Placed(str(array.dtype), array.shape, (Fragment(Box.whole(array.shape), path, 0),))
