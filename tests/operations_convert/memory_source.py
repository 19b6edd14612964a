"""A source whose files are buffers in memory: the smallest thing that the verbs can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptengine.errors import NotFound, Truncated
from ckptengine.layout.tensor import LogicalTensor


class MemoryFiles:
    """Files by name; counts what is read, per file, so that tests can bound it."""

    root = "memory"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.contents = dict(files)
        self.reads: list[tuple[str, int, int]] = []

    def size(self, path: str) -> int:
        return len(self.contents[path])

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        out = bytearray(nbytes)
        self.read_into(path, offset, memoryview(out))
        return bytes(out)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        if path not in self.contents:
            raise NotFound(f"{path}: no such file")
        view = view.cast("B")
        data = self.contents[path][offset : offset + len(view)]
        if len(data) != len(view):
            raise Truncated(f"{path}: {len(self.contents[path])} bytes where {offset + len(view)} are recorded")
        self.reads.append((path, offset, len(view)))
        view[:] = data

    def exists(self, path: str) -> bool:
        return path in self.contents

    def list(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.contents if name.startswith(prefix))

    def local_path(self, path: str) -> str | None:
        return None

    @property
    def bytes_read(self) -> int:
        return sum(nbytes for _, _, nbytes in self.reads)


class MemorySource:
    """Tensors and values given by hand over `MemoryFiles`."""

    format = "memory"

    def __init__(
        self, files: Mapping[str, bytes], tensors: Sequence[LogicalTensor], values: object = None, step: int | None = 7
    ) -> None:
        self.files = MemoryFiles(files)
        self.step = step
        self.metrics: dict[str, float] = {}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._values: object = {} if values is None else values

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> LogicalTensor:
        return self._tensors[name]

    def aliases(self) -> dict[str, str]:
        return {}

    def values(self) -> object:
        return self._values
