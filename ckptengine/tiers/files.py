"""A tier as the read-only files of a root, for everything that reads history and manifests wherever they lie."""

from __future__ import annotations

from ckptengine.errors import NotFound
from ckptengine.tiers.loop import BlockingTier


class TierFiles:
    """See `ckptengine.store.history.RootFiles`; every call looks at the tier."""

    def __init__(self, tier: BlockingTier) -> None:
        self.tier = tier

    @property
    def root(self) -> str:
        return self.tier.label

    def entries(self, folder: str = "") -> list[str]:
        """Names directly beneath ``folder``, folders among them marked with a trailing ``/``."""
        prefix = f"{folder}/" if folder else ""
        found: set[str] = set()
        for entry in self.tier.entries(prefix):
            head, slash, _ = entry.name[len(prefix) :].partition("/")
            found.add(head + slash)
        return sorted(found)

    def size(self, path: str) -> int:
        entry = self.tier.stat(path)
        if entry is None:
            raise NotFound(f"{self.tier.label}/{path} does not exist")
        return entry.size_bytes

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self.tier.read(path, offset, nbytes)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        self.tier.read_into(path, offset, view)
