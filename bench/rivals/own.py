"""ckptengine itself, by its public face only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ..engine import Engine, Unavailable, Wait, require
from ..state import LiveState


def digest_function() -> Callable[[memoryview], object] | None:
    """ckptengine's native digest, or none where it is not built."""
    try:
        native = require("ckptengine.native")
    except Unavailable:
        return None
    if not native.available():
        return None

    def digest(data: memoryview) -> object:
        return native.raw_crc64(data)

    return digest


class CkptEngine(Engine):
    """A `Checkpointer` with its defaults."""

    distributions: ClassVar[tuple[str, ...]] = ("ckptengine",)
    configuration: ClassVar[str] = 'Checkpointer with defaults (overlap="wait"); fence before the update'
    durable_by_itself: ClassVar[bool] = True
    reshards: ClassVar[bool] = True

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._ce = require("ckptengine")
        self._checkpointer: Any = self._ce.Checkpointer(state.live(), str(root), random=False)

    def save(self, step: int) -> Wait:
        handle = self._checkpointer.save(step)

        def wait() -> None:
            handle.wait("durable")

        return wait

    def before_update(self) -> None:
        self._checkpointer.fence()

    def restore(self, step: int) -> None:
        self._ce.load(self.state.live(), str(self.root), step)

    def close(self) -> None:
        self._checkpointer.close()

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the package that is imported, installed or not."""
        return {"ckptengine": str(require("ckptengine").__version__)}
