"""`torch.save` of the state dicts, as most training scripts do it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import torch

from ..engine import Engine, Wait, finished


class TorchSave(Engine):
    """Plain `torch.save`; the harness syncs the file in the background."""

    distributions: ClassVar[tuple[str, ...]] = ("torch",)
    configuration: ClassVar[str] = "torch.save(state dicts); restore: torch.load(mmap=True), copied into place"

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:09d}.pt"

    def save(self, step: int) -> Wait:
        torch.save(self.state.nested(), self.path(step))
        return finished

    def restore(self, step: int) -> None:
        self.state.fill(torch.load(self.path(step), mmap=True, weights_only=True, map_location="cpu"))


class TorchSaveFsync(TorchSave):
    """`torch.save` as a careful script does it: temporary name, fsync, rename, fsync of the directory."""

    configuration: ClassVar[str] = "torch.save to a temporary name, fsync, rename, fsync of the directory"
    durable_by_itself: ClassVar[bool] = True

    def save(self, step: int) -> Wait:
        target = self.path(step)
        temporary = target.with_suffix(".tmp")
        with open(temporary, "wb") as stream:
            torch.save(self.state.nested(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(target)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return finished
