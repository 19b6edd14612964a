"""What a source that shows another one in a different way has from that one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptengine.sources.port import Checksummed, Files, HoldsZips, Source, Verifying


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

    def checksums(self) -> Mapping[str, str]:
        """See `ckptengine.sources.port.Checksummed`."""
        return self._base.checksums() if isinstance(self._base, Checksummed) else {}

    def zips(self) -> Iterable[tuple[str, int, int]]:
        """See `ckptengine.sources.port.HoldsZips`."""
        return self._base.zips() if isinstance(self._base, HoldsZips) else ()


class WrappingVerifying(Wrapping):
    """What it is where the base is `Verifying`."""

    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        """See `ckptengine.sources.port.Verifying`."""
        assert isinstance(self._base, Verifying)
        self._base.read_verified(path, offset, view)
