"""One checkpoint read from several tiers: every byte from the nearest tier that has it intact.

The copies of a rank file are the same bytes, so a piece that is missing or damaged on one tier is taken from the next,
fragment by fragment, and what was used is counted.  A node whose own tier came back empty reads from the tiers behind.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ckptengine.errors import CheckpointError, Damaged, NotFound, StorageFailed, Truncated, UnreadableFormat
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Files
from ckptengine.store import manifest as manifests
from ckptengine.store import names, rankfile
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import Manifest
from ckptengine.store.reader import Reader

T = TypeVar("T")

_NEXT = (Damaged, NotFound, StorageFailed, UnreadableFormat)
"""What a tier may have wrong with it while another tier is fine."""


class TieredFiles:
    """The union of what lies beneath several roots, nearest first; see `ckptengine.sources.port.Files`.

    A tier that cannot be reached counts as empty, and is named in ``troubles``.
    """

    def __init__(self, tiers: Sequence[Files]) -> None:
        self.tiers = tuple(tiers)
        self.troubles: dict[str, str] = {}

    @property
    def root(self) -> str:
        return " + ".join(tier.root for tier in self.tiers)

    def entries(self, folder: str = "") -> list[str]:
        found: set[str] = set()
        for tier in self.tiers:
            try:
                found.update(tier.entries(folder))
            except (StorageFailed, NotFound) as failure:
                self.troubles[tier.root] = str(failure)
        return sorted(found)

    def exists(self, path: str) -> bool:
        return not path or any(self._try(lambda tier: tier.exists(path), False))

    def size(self, path: str) -> int:
        return self._first(path, lambda tier: tier.size(path))

    def read(self, path: str, offset: int, nbytes: int) -> bytes:
        return self._first(path, lambda tier: tier.read(path, offset, nbytes))

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        self._first(path, lambda tier: tier.read_into(path, offset, view))

    def sub(self, folder: str) -> TieredFiles:
        return TieredFiles([tier.sub(folder) for tier in self.tiers])

    def local_path(self, path: str) -> str | None:
        """None: which tier a byte comes from is known only when it has been read."""
        del path
        return None

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    def _try(self, call: Callable[[Files], T], otherwise: T) -> list[T]:
        results = []
        for tier in self.tiers:
            try:
                results.append(call(tier))
            except StorageFailed as failure:
                self.troubles[tier.root] = str(failure)
                results.append(otherwise)
        return results

    def _first(self, path: str, call: Callable[[Files], T]) -> T:
        failure: CheckpointError | None = None
        for tier in self.tiers:
            try:
                return call(tier)
            except _NEXT as error:
                if not isinstance(error, NotFound):
                    self.troubles[tier.root] = str(error)
                # What a tier has wrong with it says more than that another one does not have it.
                failure = error if failure is None or isinstance(failure, NotFound) else failure
        raise failure or NotFound(f"{path} does not exist: there are no tiers")


class TieredReader(Reader):
    """A reader that asks one reader after another, nearest tier first.  Thread-safe."""

    def __init__(self, manifest: Manifest, tiers: Sequence[Files], prefix: str) -> None:
        super().__init__(manifest, tiers[0], prefix)
        self._labels = [tier.root for tier in tiers]
        self._readers = [Reader(manifest, tier, prefix) for tier in tiers]
        self._gone: set[tuple[int, int]] = set()
        self._count_lock = threading.Lock()
        self.used_bytes: Counter[str] = Counter()
        self.troubles: dict[tuple[str, int], str] = {}

    def tail(self, rank: int) -> rankfile.Tail:
        return self._ask(rank, lambda reader: reader.tail(rank))[1]

    def granules(self, rank: int, row: int) -> npt.NDArray[np.uint64]:
        return self._ask(rank, lambda reader: reader.granules(rank, row))[1]

    def values(self, rank: int) -> Any:
        return self._ask(rank, lambda reader: reader.values(rank))[1]

    def read_verified(self, path: str, offset: int, view: memoryview) -> None:
        rank = self._ranks.get(path)
        if rank is None:
            raise NotFound(f"{path} is no rank file of step {self.manifest.step}")
        label, _ = self._ask(rank, lambda reader: reader.read_verified(path, offset, view))
        with self._count_lock:
            self.used_bytes[label] += len(view)

    def check_sizes(self) -> None:
        """Every rank file must be there in its size on one tier or another."""
        for rank in range(self.manifest.world):
            self._ask(rank, lambda reader, rank=rank: reader._checked_size(rank))  # type: ignore[misc]

    def _ask(self, rank: int, call: Callable[[Reader], T]) -> tuple[str, T]:
        failures: list[CheckpointError] = []
        for number, (label, reader) in enumerate(zip(self._labels, self._readers, strict=True)):
            if (number, rank) in self._gone:
                continue
            try:
                return label, call(reader)
            except _NEXT as error:
                failures.append(error)
                self.troubles.setdefault((label, rank), str(error))
                if not self._has(reader, rank):
                    self._gone.add((number, rank))
        if not failures:
            raise NotFound(f"{self.path(rank)} is on none of {', '.join(self._labels)}; restore an older step")
        raise next((error for error in failures if isinstance(error, Damaged)), failures[0])

    @staticmethod
    def _has(reader: Reader, rank: int) -> bool:
        """Whether a tier has the rank's file at all; without it nothing more is asked of that tier for this rank."""
        try:
            reader.tail(rank)
        except _NEXT:
            return False
        return True


def open_tiered(tiers: Sequence[Files], ref: CommitRef) -> NativeSource:
    """The checkpoint of ``ref`` over ``tiers``, nearest first.

    Raises what is wrong with the manifest where no tier has a good one.
    """
    prefix = f"{names.step_dir(ref.step)}/"
    path = prefix + names.manifest(ref.attempt, ref.save)
    failures: list[CheckpointError] = []
    for tier in tiers:
        try:
            where, size_bytes = f"{tier.root}/{path}", tier.size(path)
            if size_bytes > manifests.MANIFEST_LIMIT_BYTES:
                raise Truncated(f"{where} has {size_bytes} bytes, more than a manifest can have")
            manifest = manifests.decode(tier.read(path, 0, size_bytes), where)
            if (manifest.step, manifest.attempt, manifest.save) != (ref.step, ref.attempt, ref.save):
                raise UnreadableFormat(f"{where}: is the manifest of another save; the file was renamed")
        except _NEXT as error:
            failures.append(error)
            continue
        source = NativeSource(TieredFiles(tiers), manifest, prefix)
        source.reader = TieredReader(manifest, tiers, prefix)
        return source
    raise next((error for error in failures if not isinstance(error, NotFound)), failures[0])
