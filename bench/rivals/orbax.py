"""Orbax (JAX's checkpointing) over the same numpy memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from ..engine import Engine, Wait, require
from ..state import LiveState


class Orbax(Engine):
    """`AsyncCheckpointer(StandardCheckpointHandler)` of a tree of numpy arrays."""

    distributions: ClassVar[tuple[str, ...]] = ("orbax-checkpoint", "jax")
    configuration: ClassVar[str] = "AsyncCheckpointer, StandardSave of numpy arrays; the next save waits"

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._ocp = require("orbax.checkpoint", "orbax-checkpoint")
        self._checkpointer = self._ocp.AsyncCheckpointer(self._ocp.StandardCheckpointHandler())

    def _tree(self) -> dict[str, Any]:
        return {path: tensor.detach().to("cpu").numpy() for path, tensor in self.state.tensors().items()}

    def save(self, step: int) -> Wait:
        self._checkpointer.wait_until_finished()
        self._checkpointer.save(self.path(step).absolute(), args=self._ocp.args.StandardSave(self._tree()))
        wait: Wait = self._checkpointer.wait_until_finished
        return wait

    def restore(self, step: int) -> None:
        loaded = self._checkpointer.restore(
            self.path(step).absolute(), args=self._ocp.args.StandardRestore(self._tree())
        )
        self.state.fill_flat({path: torch.from_numpy(array) for path, array in loaded.items()})

    def close(self) -> None:
        self._checkpointer.close()
