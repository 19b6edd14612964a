"""What a tier that a node has for itself is given beside its ranks' files: the attempt's records, and the manifest."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from ckptengine.coordination.port import Coordinator, publish, receive
from ckptengine.errors import AlreadyExists, CheckpointError
from ckptengine.operations.draining.commit import Named
from ckptengine.operations.levels.level import Landed, Level

log = logging.getLogger("ckptengine")


def told_of(
    landed: Landed, records: Sequence[Named], *, port: Coordinator, leads: bool, number: int, timeout_s: float
) -> Landed:
    """``landed`` with the manifest and the ``records`` of its attempt, which rank 0 has, on each rank that ``leads``
    its node; called for each step that lands, the ``number``-th."""
    if port.world == 1:
        return landed
    key = f"manifest/{number}"
    if port.rank == 0:
        assert landed.manifest is not None
        document = [landed.manifest.decode("latin-1"), [(one.name, one.data.decode("latin-1")) for one in records]]
        publish(port, key, document)
        port.delete(f"manifest/{number - 1}")  # every rank has come to this one
        return landed
    if not leads:
        return landed
    manifest, told = receive(port, key, timeout_s)
    named = tuple(Named(str(name), str(data).encode("latin-1")) for name, data in told)
    return replace(landed, manifest=str(manifest).encode("latin-1"), records=named)


def commit_on(level: Level, landed: Landed) -> None:
    """Commit a step on a tier that this node has for itself; on a shared one rank 0 has just done it."""
    if landed.manifest is None or not level.is_directory:
        return
    try:
        for record in landed.records:
            with contextlib.suppress(AlreadyExists):
                level.flat.create(record.name, record.data)
        level.flat.create(landed.manifest_name, landed.manifest)
        level.own = True
    except AlreadyExists:
        return  # the tier is shared with rank 0's node
    except CheckpointError as refused:
        # What ranks do here must stay alike, so that nobody waits for this one.
        log.warning("%s has no manifest of step %d: %s", level.spec.label, landed.step, refused)
