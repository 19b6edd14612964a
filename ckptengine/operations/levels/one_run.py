"""Whether what lies on tiers was saved for the root behind: what another job left is neither restored nor mixed in.

An attempt is announced on the root before anything is saved in its name, and its record says which root that was.  So
what a tier holds belongs to a root that has the very same record.  A root that holds nothing was lost, or is a new one:
the records then say for which root things were saved, or the user says as which ``run=`` the job goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptengine.errors import CheckpointError, Conflict, Damaged, UnreadableFormat
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import Attempt, CommitRef, History
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.loop import BlockingTier
from ckptengine.tiers.spec import Tier

log = logging.getLogger("ckptengine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """An attempt that a tier holds something of: a commit of ``step``, or its record alone.

    ``root``: which one it was saved for, empty where its record does not say.  ``digest``: that of the record, empty
    where the tier has no intact one, as those that other nodes than rank 0's have for themselves.  ``manifest`` and
    ``manifest_digest``: name and content of that of the commit.
    """

    tier: str
    attempt: int
    run: str
    step: int | None = None
    root: str = ""
    digest: str = ""
    manifest: str = ""
    manifest_digest: str = ""

    def __str__(self) -> str:
        what = "records" if self.step is None else f"step {self.step}"
        return f"{self.tier} holds {what} of run {self.run!r}" + (f", saved for {self.root}" if self.root else "")


def place_of(root: Tier) -> str:
    """A root as attempts record it: without credentials, and the same however its path is spelled."""
    folder = root.local_path
    return root.identity.rstrip("/") if folder is None else os.path.realpath(folder)


def left_on(tiers: Sequence[BlockingTier]) -> list[Left]:
    """Every attempt that has commits on any of ``tiers``, and the newest that has a record there."""
    return [left for tier in tiers for left in _left_on(tier)]


def require_own(
    left: Sequence[Sequence[Left]], tiers: Sequence[BlockingTier], place: str, everywhere: History, run: str | None
) -> None:
    """Raise `Conflict` where anything of ``left``, by rank, was not saved for the root, the last of ``tiers``.

    Called by rank 0, whose ``tiers`` they are; ``place``: the root as attempts record it; ``everywhere``: the history
    over all of them; ``run``: as which the job goes on, where the user says so.
    """
    root = History(TierFiles(tiers[-1]))
    try:
        newest = root.newest_attempt()
    except (Damaged, UnreadableFormat):
        return  # what it knows cannot be told
    for found in left[0]:
        _require_known(found, newest, tiers, place, run)
    for found in (one for others in left[1:] for one in others):
        known = _record(root, found.attempt) or _record(everywhere, found.attempt)
        if known is None or not _is_same(found, known) or not _same_manifest(found, tiers):
            raise Conflict(
                f"{found}, of which neither {tiers[-1].label} nor the tiers of rank 0 know: another job left it there, "
                f"or what knew of it is lost. Start rank 0 where it was last, if that is why; else give this job a "
                f"tier of its own, or remove it"
            )
    if newest is None:
        _require_one([found for found in left[0] if found.step is not None], tiers[-1].label)


def _require_known(
    found: Left, newest: Attempt | None, tiers: Sequence[BlockingTier], place: str, run: str | None
) -> None:
    """Raise `Conflict` unless ``found``, on one of rank 0's tiers, was saved for the root."""
    root, label = History(TierFiles(tiers[-1])), tiers[-1].label
    aside = (
        "Give this job a tier of its own, or remove it; to go on from what is there, give it as start_from to a job "
    )
    aside += "with other tiers"
    if newest is None:
        if run is None and found.root == place:
            return
        if run is not None and found.run == run:
            if found.root != place:
                log.warning("%s; it goes on at %s, which holds nothing, as run=%r says", found, label, run)
            return
        raise Conflict(
            f"{found}, and {label} holds nothing: another job left it there. {aside}. If it is this job, and {label} "
            f"takes the place of a root that was lost, say so: run={found.run!r}"
        )
    known = _record(root, found.attempt)
    if known is None and found.run == newest.run:
        # A root that was put back as it was some time ago: what they have in common tells.
        known, found = _newest_common(root, tiers[:-1], found)
    if found.run != newest.run if known is None else not _is_same(found, known):
        raise Conflict(f"{found}, which {label}, of run {newest.run!r}, knows nothing of: another job left it. {aside}")


def _newest_common(root: History, tiers: Sequence[BlockingTier], found: Left) -> tuple[Attempt | None, Left]:
    """The root's record of the newest attempt that the tier of ``found`` has one of too, and what that one says."""
    here = next(History(TierFiles(tier)) for tier in tiers if tier.label == found.tier)
    for number in sorted(set(root.attempt_numbers()).intersection(here.attempt_numbers()), reverse=True):
        known, own = _record(root, number), _record(here, number)
        if known is not None and own is not None:
            return known, replace(found, attempt=number, run=own.run, root=own.root, digest=own.digest)
    return None, found


def _is_same(found: Left, known: Attempt) -> bool:
    return found.run == known.run and found.digest in ("", known.digest)


def _same_manifest(found: Left, tiers: Sequence[BlockingTier]) -> bool:
    """Whether the nearest manifest of this name on ``tiers``, if there is any, is the one that was found."""
    for tier in tiers if found.manifest else ():
        data = _read(tier, found.manifest)
        if data is not None:
            return hashlib.sha256(data).hexdigest() == found.manifest_digest
    return True


def _require_one(found: Sequence[Left], root: str) -> None:
    """Of a root that holds nothing: see that its tiers are of one run, and say that it goes on from them."""
    if not found:
        return
    first, other = found[0], next((one for one in found if one.run != found[0].run), None)
    if other is not None:
        raise Conflict(
            f"{root} holds nothing, and its tiers are of several runs: {first}; {other}. Remove what is not to be gone "
            f"on from, or name what is: run={first.run!r}"
        )
    log.warning("%s holds nothing, it was emptied or lost; %s. To begin anew, remove that", root, first)


def _left_on(tier: BlockingTier) -> list[Left]:
    history = History(TierFiles(tier))
    newest: dict[int, CommitRef | None] = dict.fromkeys(history.attempt_numbers()[-1:])
    for ref in history.commits():
        newest[ref.attempt] = max(ref, newest.get(ref.attempt) or ref)
    found = []
    for number, commit in newest.items():
        record, left = _record(history, number), None if commit is None else _committed(tier, commit)
        if record is not None:
            left = left or Left(tier=tier.label, attempt=number, run=record.run)
            left = replace(left, run=record.run, root=record.root, digest=record.digest)
        if left is not None:
            found.append(left)
    return found


def _record(history: History, number: int) -> Attempt | None:
    try:
        return history.read_attempt(number)
    except (Damaged, UnreadableFormat):
        return None


def _committed(tier: BlockingTier, ref: CommitRef) -> Left | None:
    """A commit by its manifest; None where that is damaged, or was just removed: it is not restored either."""
    name = f"{names.step_dir(ref.step)}/{names.manifest(ref.attempt, ref.save)}"
    try:
        data = _read(tier, name)
        run = None if data is None else manifests.decode(data, f"{tier.label}/{name}").run
    except CheckpointError:
        return None
    if data is None or run is None:
        return None
    digest = hashlib.sha256(data).hexdigest()
    return Left(tier=tier.label, attempt=ref.attempt, run=run, step=ref.step, manifest=name, manifest_digest=digest)


def _read(tier: BlockingTier, name: str) -> bytes | None:
    entry = tier.stat(name)
    if entry is None or entry.size_bytes > manifests.MANIFEST_LIMIT_BYTES:
        return None
    return tier.read(name, 0, entry.size_bytes)
