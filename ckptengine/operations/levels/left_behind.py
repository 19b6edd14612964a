"""What an earlier job left on its tiers, and did not live to carry on to the root."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.errors import CheckpointError, NotFound
from ckptengine.operations.levels.level import Landed
from ckptengine.operations.levels.tiered import TieredFiles
from ckptengine.operations.levels.whereabouts import Whereabouts, find_files
from ckptengine.sources.native import NativeSource
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import Manifest
from ckptengine.tiers.loop import BlockingTier

log = logging.getLogger("ckptengine")

_SHOWN = 8


def left_behind(
    tiers: Sequence[BlockingTier],
    ref: CommitRef,
    *,
    port: Coordinator,
    leads: bool,
    key: str,
    timeout_s: float,
    again: bool = False,
) -> Landed | None:
    """The commit as one that has landed wherever its files are, each carried on by one rank that sees it.

    Asked by all ranks alike; the last of ``tiers`` is the root.  None where that has the step already: its manifest, or
    (``again``) every file too.  Raises `NotFound`, on all ranks, where a file is nowhere.
    """
    data = _announced(tiers, ref, port=port, key=key, timeout_s=timeout_s, again=again)
    if data is None:
        return None
    manifest = manifests.decode(data, f"{names.step_dir(ref.step)}/{names.manifest(ref.attempt, ref.save)}")
    found = find_files(tiers, ref, manifest, port=port, leads=leads, key=key, timeout_s=timeout_s)
    if found.missing:
        raise _nowhere(ref, manifest, found, tiers[-1].label)
    mine = {rank: place.tier for rank, place in found.places.items() if place.rank == port.rank}
    # The manifest is put behind the last hop, even where nothing is left to carry there.
    at = min(len(tiers) - 2, *(place.tier for place in found.places.values()))
    log.info(
        "step %d, which an earlier job left on %s, is carried on",
        *(ref.step, tiers[at].label),
        extra={"ckptengine": {"step": ref.step, "tier": tiers[at].label}},
    )
    return Landed(
        step=ref.step,
        attempt=ref.attempt,
        save=ref.save,
        files={rank: manifest.files[rank] for rank in mine},
        manifest=data if port.rank == 0 else None,
        all_the_way=True,
        at=at,
        lies_on=mine,
    )


def _announced(
    tiers: Sequence[BlockingTier], ref: CommitRef, *, port: Coordinator, key: str, timeout_s: float, again: bool
) -> bytes | None:
    """The manifest, as rank 0 finds it on the nearest tier; None where there is nothing to carry."""
    if port.rank != 0:
        told = receive(port, f"{key}/manifest", timeout_s)
        return None if told is None else str(told).encode("latin-1")
    data: bytes | None = None
    try:
        data = _manifest_of(tiers, ref, again=again)
    except CheckpointError as failure:
        log.warning("step %d, which an earlier job left, is not carried on: %s", ref.step, failure)
    publish(port, f"{key}/manifest", None if data is None else data.decode("latin-1"))
    return data


def _manifest_of(tiers: Sequence[BlockingTier], ref: CommitRef, *, again: bool) -> bytes | None:
    """The nearest manifest that is intact; None where the root has what is asked for."""
    folder = names.step_dir(ref.step)
    name = f"{folder}/{names.manifest(ref.attempt, ref.save)}"
    on_root = tiers[-1].stat(name) is not None
    if on_root and not again:
        return None
    for tier in tiers if again else tiers[:-1]:
        entry = tier.stat(name)
        if entry is None:
            continue
        data = tier.read(name, 0, entry.size_bytes)
        manifest = manifests.decode(data, f"{tier.label}/{name}")
        return None if on_root and _is_whole(tiers[-1], folder, manifest) else data
    return None


def _is_whole(tier: BlockingTier, folder: str, manifest: Manifest) -> bool:
    sizes = {entry.name: entry.size_bytes for entry in tier.entries(f"{folder}/")}
    return all(
        sizes.get(f"{folder}/{manifest.file_name(rank)}") == record.nbytes for rank, record in enumerate(manifest.files)
    )


def _nowhere(ref: CommitRef, manifest: Manifest, found: Whereabouts, root: str) -> NotFound:
    lost = ", ".join(map(str, found.missing[:_SHOWN])) + (", ..." if len(found.missing) > _SHOWN else "")
    example = manifest.file_name(found.missing[0])
    return NotFound(
        f"step {ref.step}: what ranks {lost} of {manifest.world} wrote is neither on a tier that any rank sees nor on "
        f"{root}: {example}, with parts of {_needing(ref, manifest, found.missing)}; bring back the disk of the node "
        f"that they ran on, or copy those files to {root}/{names.step_dir(ref.step)}, or go on from an older step"
    )


def _needing(ref: CommitRef, manifest: Manifest, missing: Sequence[int]) -> str:
    """The first tensors of which those ranks wrote a part, in words."""
    source, lost = NativeSource(TieredFiles([]), manifest, f"{names.step_dir(ref.step)}/"), frozenset(missing)
    needing = (record.name for record in manifest.tensors if any(rank in lost for rank, _, _ in source.places(record)))
    found = list(itertools.islice(needing, 4))
    return ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else "") if found else "no tensor"
