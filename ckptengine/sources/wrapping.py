"""What a source that shows another one in a different way has from that one."""

from __future__ import annotations

from collections.abc import Mapping

from ckptengine.sources.port import Files, Source


class Wrapping:
    """The part of `Source` that does not depend on how tensors are shown."""

    def __init__(self, base: Source) -> None:
        self._base = base

    @property
    def format(self) -> str:
        return self._base.format

    @property
    def step(self) -> int | None:
        return self._base.step

    @property
    def metrics(self) -> Mapping[str, float]:
        return self._base.metrics

    @property
    def files(self) -> Files:
        return self._base.files
