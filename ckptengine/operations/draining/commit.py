"""The commit at the end of a drain: attempt records and the manifest, put exclusively, unless a newer attempt owns the
target; looked at again before anybody is told that the step is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ckptengine.errors import (
    AlreadyExists,
    CheckpointError,
    Damaged,
    Superseded,
    UnreadableFormat,
    UnusableRequest,
)
from ckptengine.store import names
from ckptengine.store.history import Attempt, CommitRef, decode_attempt
from ckptengine.tiers.port import TierPort

_POLL_S = 0.1
_CLAIMING_S = 5.0
"""How long a claim may be there without its record before it counts as that of a job that died in between."""


@dataclass(frozen=True, slots=True)
class Named:
    """A small object: its name beneath the tier's root, and its content."""

    name: str
    data: bytes


async def publish(target: TierPort, manifest: Named, companions: Sequence[Named]) -> None:
    """Put ``companions``, then ``manifest``; objects that exist must be equal.

    Raises `Superseded` where a newer attempt, or another job, has the target.
    """
    await _refuse_if_superseded(target, manifest)
    for small in (*companions, manifest):
        try:
            await target.create(small.name, small.data)
        except AlreadyExists:
            entry = await target.stat(small.name)
            same = entry is not None and entry.size_bytes == len(small.data)
            if not same or await target.read(small.name, 0, len(small.data)) != small.data:
                raise Superseded(
                    f"{target.label}/{small.name} exists with other content: another job writes there; "
                    f"give each job a root of its own"
                ) from None
    await _refuse_if_superseded(target, manifest)


async def _refuse_if_superseded(target: TierPort, manifest: Named) -> None:
    """Raise `Superseded` unless the newest attempt is the manifest's own, or counts it as its past."""
    match = names.MANIFEST_PATTERN.search(manifest.name)
    if match is None:
        raise UnusableRequest(f"{manifest.name} is not the name of a manifest")
    found = [names.ATTEMPT_PATTERN.search(entry.name) for entry in await target.entries(f"{names.ATTEMPTS}/")]
    newer = {int(claimed[1]) for claimed in found if claimed is not None and int(claimed[1]) > int(match[1])}
    for attempt in sorted(newer, reverse=True):
        record = await _record_of(target, attempt)
        if record is not None:
            if _ref_of(manifest.name) in record.inherited:
                return
            break
        # One that died before it recorded anything: the one before it says what counts.
    if newer:
        raise Superseded(
            f"{target.label}: attempt {max(newer)} took over from attempt {int(match[1])}; "
            f"this job may not commit there any more"
        )


async def _record_of(target: TierPort, attempt: int) -> Attempt | None:
    """What an attempt has recorded, from whichever copy is intact; None where it died before."""
    copies = [f"{names.ATTEMPTS}/{names.attempt_record(attempt, copy)}" for copy in (0, 1)]
    deadline_s = time.monotonic() + _CLAIMING_S
    while (entry := await target.stat(copies[0])) is None and time.monotonic() < deadline_s:
        await asyncio.sleep(_POLL_S)  # between its claim and its record
    damage: CheckpointError | None = None
    for name in copies:
        entry = await target.stat(name)
        if entry is None:
            continue
        data = await target.read(name, 0, entry.size_bytes)
        try:
            return decode_attempt(data, attempt, f"{target.label}/{name}")
        except (Damaged, UnreadableFormat) as found:
            damage = found
    if damage is not None:
        raise damage
    return None


def _ref_of(manifest_name: str) -> CommitRef | None:
    folder, _, base = manifest_name.partition("/")
    step, saved = names.STEP_PATTERN.match(folder), names.MANIFEST_PATTERN.match(base)
    return None if step is None or saved is None else CommitRef(int(step[1]), int(saved[1]), int(saved[2]))
