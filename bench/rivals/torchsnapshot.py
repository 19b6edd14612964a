"""TorchSnapshot: `Snapshot.async_take`, which blocks until the state is staged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ..engine import Engine, Wait, require
from ..state import LiveState, TrainingState


class TorchSnapshot(Engine):
    """The application state of its documentation: the module and the optimizer themselves."""

    distributions: ClassVar[tuple[str, ...]] = ("torchsnapshot",)
    configuration: ClassVar[str] = "Snapshot.async_take; the next save waits for the one before"

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._module = require("torchsnapshot")
        self._pending: Any = None

    def _app_state(self) -> dict[str, Any]:
        if isinstance(self.state, TrainingState):
            return self.state.live()
        return {"tensors": self._module.StateDict(**self.state.nested()["tensors"])}

    def save(self, step: int) -> Wait:
        if self._pending is not None:
            self._pending.wait()
        pending = self._module.Snapshot.async_take(str(self.path(step)), self._app_state())
        self._pending = pending

        def wait() -> None:
            pending.wait()

        return wait

    def restore(self, step: int) -> None:
        self._module.Snapshot(str(self.path(step))).restore(self._app_state())

    def close(self) -> None:
        if self._pending is not None:
            self._pending.wait()
