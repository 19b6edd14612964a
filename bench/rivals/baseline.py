"""The two ends of the scale: no checkpoint at all, and the state's bytes at the speed of the disk."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..disk import BLOCK_BYTES, aligned_buffer, read_file, write_file
from ..engine import Engine, Wait, finished
from ..state import LiveState


class NoCheckpoint(Engine):
    """Saves nothing: what it shows is the noise of the measurement."""

    configuration: ClassVar[str] = "no checkpoint; its figures are the noise"
    durable_by_itself: ClassVar[bool] = True
    checked: ClassVar[bool] = False

    def save(self, step: int) -> Wait:
        return finished

    def restore(self, step: int) -> None:
        """There is nothing to restore."""


class RawWrite(Engine):
    """As many bytes as the state has, from one warm aligned buffer, O_DIRECT in 4 MiB blocks, then fsync."""

    configuration: ClassVar[str] = "the same number of bytes by O_DIRECT pwrite, synchronous; holds no state"
    durable_by_itself: ClassVar[bool] = True
    checked: ClassVar[bool] = False

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._buffer = aligned_buffer(BLOCK_BYTES)
        self._size_bytes = state.size_bytes

    def save(self, step: int) -> Wait:
        write_file(self.path(step), self._size_bytes, self._buffer)
        return finished

    def restore(self, step: int) -> None:
        read_file(self.path(step))
