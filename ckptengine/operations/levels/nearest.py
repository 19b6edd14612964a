"""Opening a checkpoint that may lie on several tiers: whole from the nearest one, else piece by piece from all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ckptengine.errors import CheckpointError, NotFound, StorageFailed
from ckptengine.operations.levels.tiered import TieredReader, open_tiered
from ckptengine.sources.native import NativeSource
from ckptengine.sources.port import Files, Source
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.reader import Reader

log = logging.getLogger("ckptengine")


class Nearest:
    """The ways to open a commit over ``tiers``, nearest first; see `ckptengine.operations.restore.Openers`.

    ``bring_together``: has on the last one what nodes have each for themselves; see `Levels.bring_together`.
    """

    def __init__(self, tiers: Sequence[Files], bring_together: Callable[[CommitRef], bool]) -> None:
        self._tiers = tuple(tiers)
        self._bring_together = bring_together
        self._used: NativeSource | None = None

    def __call__(self, ref: CommitRef) -> Iterator[Callable[[], Source]]:
        """First the nearest tier that has any of it, by itself where it has all, which reads fastest; then every piece
        from the nearest tier that has that piece intact.  A node's own tier has what its ranks wrote: where that is not
        enough, all of it is brought together on the root."""
        yield lambda: self._whole(ref)
        yield lambda: self._mixed(ref)
        try:
            carried = self._bring_together(ref)
        except CheckpointError as failure:
            yield partial(_refuse, failure)
            return
        if carried:
            yield lambda: self._mixed(ref)

    def _whole(self, ref: CommitRef) -> Source:
        for tier in self._tiers:
            try:
                source = open_tiered([tier], ref)
                source.reader.check_sizes()
            except CheckpointError:
                if _has_some(tier, ref):
                    break  # what is here is not to be fetched from further off
                continue
            self._used = NativeSource(tier, source.manifest, f"{names.step_dir(ref.step)}/")
            return self._used
        return self._mixed(ref)

    def _mixed(self, ref: CommitRef) -> Source:
        self._used = open_tiered(self._tiers, ref)
        return self._used

    def used(self) -> dict[str, int]:
        """Bytes by the tier that they came from, for the commit that was opened last; None counted: all of them."""
        source = self._used
        if source is None:
            return {}
        if isinstance(source.reader, TieredReader):
            return dict(source.reader.used_bytes)
        return {source.files.root: source.manifest.nbytes}

    def report(self, step: int) -> None:
        """Say in the log what was used, and what was wrong with nearer tiers."""
        used = self.used()
        told = ", ".join(f"{nbytes} bytes from {label}" for label, nbytes in used.items())
        log.info("step %d was restored: %s", step, told, extra={"ckptengine": {"step": step, "used_bytes": used}})
        reader: Reader | None = self._used.reader if self._used is not None else None
        if isinstance(reader, TieredReader):
            for (label, rank), trouble in reader.troubles.items():
                fields = {"ckptengine": {"step": step, "tier": label, "rank": rank}}
                log.warning("%s could not give all of rank %d's part: %s", label, rank, trouble, extra=fields)

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()


def _has_some(tier: Files, ref: CommitRef) -> bool:
    """Whether any rank's file of the commit lies on a tier."""
    try:
        found = [names.RANK_PATTERN.match(name) for name in tier.entries(names.step_dir(ref.step))]
    except CheckpointError:
        return False
    return any(match is not None and (int(match[2]), int(match[3])) == (ref.attempt, ref.save) for match in found)


def _refuse(failure: CheckpointError) -> Source:
    if isinstance(failure, NotFound):
        raise failure
    raise StorageFailed(f"it could not be brought together from the tiers of all nodes: {failure}") from failure
