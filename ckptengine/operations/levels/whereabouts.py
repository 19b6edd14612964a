"""Where the rank files of one commit lie: on which tier, and which rank sees it there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptengine.coordination.port import Coordinator, agree
from ckptengine.errors import CheckpointError
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import Manifest
from ckptengine.tiers.loop import BlockingTier

log = logging.getLogger("ckptengine")

Seen = list[tuple[int, list[int]]]
"""Files, by the rank that wrote them, and the tiers on which one rank sees them whole."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file lies on ``tier``, where ``rank`` sees it."""

    tier: int
    rank: int


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """``places``: of each file that somebody sees, by the rank that wrote it; ``missing``: those that nobody does."""

    places: dict[int, Place]
    missing: tuple[int, ...]


def find_files(
    tiers: Sequence[BlockingTier],
    ref: CommitRef,
    manifest: Manifest,
    *,
    port: Coordinator,
    leads: bool,
    key: str,
    timeout_s: float,
) -> Whereabouts:
    """Where to take each file from; asked by all ranks alike.  The last of ``tiers`` is the root.

    A rank looks for its own file in front of the root; the files of a job of another size are dealt out.  What is not
    found so is looked for by the one rank that ``leads`` each node, and on the root.  The nearest tier that has all
    files is chosen, or else for each file the one nearest to the root.
    """
    dealt = range(port.rank, manifest.world, port.world)
    seen = _seen(enumerate(tiers[:-1]), ref, manifest, dealt)
    votes: list[tuple[int, Seen]] = list(enumerate(agree(port, f"{key}/own", seen, timeout_s)))
    missing = sorted(set(range(manifest.world)).difference(rank for _, told in votes for rank, _ in told))
    if missing:
        looked = list(enumerate(tiers))[: len(tiers) - (port.rank != 0)] if leads else []
        votes += enumerate(agree(port, f"{key}/others", _seen(looked, ref, manifest, missing), timeout_s))
    return _chosen(votes, manifest.world)


def _chosen(votes: Iterable[tuple[int, Seen]], world: int) -> Whereabouts:
    on: dict[int, dict[int, int]] = {}
    for rank, told in votes:
        for written_by, numbers in told:
            for tier in numbers:
                on.setdefault(written_by, {}).setdefault(tier, rank)
    missing = tuple(rank for rank in range(world) if rank not in on)
    common = set.intersection(*(set(tiers) for tiers in on.values())) if on and not missing else set()
    places = {}
    for written_by, tiers in on.items():
        tier = min(common) if common else max(tiers)
        places[written_by] = Place(tier, tiers[tier])
    return Whereabouts(places, missing)


def _seen(tiers: Iterable[tuple[int, BlockingTier]], ref: CommitRef, manifest: Manifest, wanted: Sequence[int]) -> Seen:
    folder = names.step_dir(ref.step)
    paths = {rank: f"{folder}/{names.rank_file(rank, ref.attempt, ref.save)}" for rank in wanted}
    found: dict[int, list[int]] = {}
    for number, tier in tiers:
        try:
            lengths = _sizes(tier, folder, list(paths.values()))
        except CheckpointError as failure:
            log.warning("%s counts as empty: %s", tier.label, failure)
            continue
        for rank, path in paths.items():
            if lengths.get(path) == manifest.files[rank].nbytes:
                found.setdefault(rank, []).append(number)
    return list(found.items())


def _sizes(tier: BlockingTier, folder: str, paths: Sequence[str]) -> dict[str, int]:
    """One request, however many there are."""
    entries = [tier.stat(paths[0])] if len(paths) == 1 else tier.entries(f"{folder}/") if paths else []
    return {entry.name: entry.size_bytes for entry in entries if entry is not None}
