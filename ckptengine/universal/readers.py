"""The port through which this folder reads tensors: the executor lives with the verbs, which import this folder."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from ckptengine.layout.box import Box
from ckptengine.layout.tensor import LogicalTensor
from ckptengine.sources.port import Source


class ReadsBoxes(Protocol):
    """Fills boxes of one tensor, like `ckptengine.operations.read.BoxReader`."""

    def read(self, box: Box, out: npt.NDArray[Any] | memoryview, *, workers: int | None = None) -> None: ...


class MakesReader(Protocol):
    """Makes the reader of one tensor of a source."""

    def __call__(self, source: Source, tensor: LogicalTensor) -> ReadsBoxes: ...
