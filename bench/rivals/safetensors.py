"""safetensors: all tensors of the state in one file, synchronous."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ..engine import Engine, Wait, finished, require
from ..state import LiveState


class Safetensors(Engine):
    """`save_file` of every tensor by its path; `load_file`, copied into place."""

    distributions: ClassVar[tuple[str, ...]] = ("safetensors",)
    configuration: ClassVar[str] = "save_file of all tensors; restore: load_file, copied into place"

    def __init__(self, root: Path, state: LiveState) -> None:
        super().__init__(root, state)
        self._module = require("safetensors.torch", "safetensors")

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:09d}.safetensors"

    def save(self, step: int) -> Wait:
        self._module.save_file(self.state.tensors(), self.path(step))
        return finished

    def restore(self, step: int) -> None:
        self.state.fill_flat(self._module.load_file(self.path(step)))
