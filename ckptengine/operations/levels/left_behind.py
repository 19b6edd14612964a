"""What an earlier job left on its tiers, and did not live to carry on to the root."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from ckptengine.coordination.port import Coordinator, agree
from ckptengine.errors import CheckpointError
from ckptengine.operations.levels.level import Landed
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import FileRecord, Manifest
from ckptengine.tiers.loop import BlockingTier

log = logging.getLogger("ckptengine")


def left_behind(
    tiers: Sequence[BlockingTier], ref: CommitRef, manifest: Manifest, *, port: Coordinator, key: str, timeout_s: float
) -> Landed | None:
    """The commit as one that has landed on the nearest of ``tiers`` that has all its files; asked by all ranks alike.

    The last of ``tiers`` is the root.  None where that has the step already, or where no other tier has every file.  A
    rank looks for its own file; the files of a job of another size are dealt out.
    """
    mine = {rank: manifest.files[rank] for rank in range(port.rank, manifest.world, port.world)}
    data: bytes | None = None
    found: list[int] = []
    try:
        if port.rank == 0:
            data = _manifest_of(tiers, ref)
        if port.rank != 0 or data is not None:
            found = [number for number, tier in enumerate(tiers[:-1]) if _has_all(tier, ref, mine)]
    except CheckpointError as failure:
        log.warning("step %d, which an earlier job left, is not carried on: %s", ref.step, failure)
        found = []
    votes = agree(port, key, found, timeout_s)
    common = set(votes[0]).intersection(*votes[1:])
    if not common:
        return None
    log.info(
        "step %d, which an earlier job left on %s, is carried on",
        *(ref.step, tiers[min(common)].label),
        extra={"ckptengine": {"step": ref.step, "tier": tiers[min(common)].label}},
    )
    return Landed(
        step=ref.step,
        attempt=ref.attempt,
        save=ref.save,
        files=mine,
        manifest=data,
        all_the_way=True,
        at=min(common),
    )


def _manifest_of(tiers: Sequence[BlockingTier], ref: CommitRef) -> bytes | None:
    """The manifest as it lies on the nearest tier that has it; None where the root has it."""
    name = f"{names.step_dir(ref.step)}/{names.manifest(ref.attempt, ref.save)}"
    if tiers[-1].stat(name) is not None:
        return None
    for tier in tiers[:-1]:
        entry = tier.stat(name)
        if entry is not None:
            return tier.read(name, 0, entry.size_bytes)
    return None


def _has_all(tier: BlockingTier, ref: CommitRef, files: Mapping[int, FileRecord]) -> bool:
    folder = names.step_dir(ref.step)
    for rank, record in files.items():
        entry = tier.stat(f"{folder}/{names.rank_file(rank, ref.attempt, ref.save)}")
        if entry is None or entry.size_bytes != record.nbytes:
            return False
    return True
