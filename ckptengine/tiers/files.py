"""A tier as the read-only files of a root, for everything that reads history and checkpoints wherever they lie."""

from __future__ import annotations

from ckptengine.errors import NotFound
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier


class TierFiles:
    """See `ckptengine.sources.port.Files`; every call looks at the tier.  ``prefix`` ends with ``/`` or is empty."""

    def __init__(self, tier: BlockingTier, prefix: str = "") -> None:
        self.tier = tier
        self._prefix = prefix

    @property
    def root(self) -> str:
        return f"{self.tier.label}/{self._prefix}".rstrip("/")

    def entries(self, folder: str = "") -> list[str]:
        """Names directly beneath ``folder``, sorted, folders among them marked with a trailing ``/``."""
        prefix = self._prefix + (f"{folder}/" if folder else "")
        found: set[str] = set()
        for entry in self.tier.entries(prefix):
            head, slash, _ = entry.name[len(prefix) :].partition("/")
            found.add(head + slash)
        return sorted(found)

    def exists(self, path: str) -> bool:
        name = self._prefix + path
        return not path or self.tier.stat(name) is not None or bool(self.tier.entries(f"{name}/"))

    def size(self, path: str) -> int:
        entry = self.tier.stat(self._prefix + path)
        if entry is None:
            raise NotFound(f"{self.root}/{path} does not exist")
        return entry.size_bytes

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self.tier.read(self._prefix + path, offset, nbytes)

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        self.tier.read_into(self._prefix + path, offset, view)

    def sub(self, folder: str) -> TierFiles:
        return TierFiles(self.tier, f"{self._prefix}{folder}/")

    def local_path(self, path: str) -> str | None:
        place = self.tier.tier
        if not isinstance(place, LocalTier):
            return None
        name = self._prefix + path
        return str(place.local_path(name.rstrip("/")) if name else place.root)

    def close(self) -> None:
        """Nothing is held here."""
