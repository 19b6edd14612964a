"""What an earlier job left where saves land, and did not live to carry on."""

from __future__ import annotations

import logging

from ckptengine.coordination.port import Coordinator, agree
from ckptengine.errors import CheckpointError
from ckptengine.operations.level import Landed
from ckptengine.store import names
from ckptengine.store.history import CommitRef
from ckptengine.store.manifest import Manifest
from ckptengine.tiers.loop import BlockingTier

log = logging.getLogger("ckptengine")


def left_behind(
    first: BlockingTier,
    root: BlockingTier,
    ref: CommitRef,
    manifest: Manifest,
    *,
    port: Coordinator,
    key: str,
    timeout_s: float,
) -> Landed | None:
    """The commit as one that has landed on tier ``first``, to be carried on; asked by all ranks alike.

    None where a rank does not find its own file there, or the root has the step already.
    """
    rank = port.rank
    folder = names.step_dir(ref.step)
    data: bytes | None = None
    can = manifest.world == port.world
    try:
        file = first.stat(f"{folder}/{names.rank_file(rank, ref.attempt, ref.save)}")
        can = can and file is not None and file.size_bytes == manifest.files[rank].nbytes
        if rank == 0 and can:
            name = f"{folder}/{names.manifest(ref.attempt, ref.save)}"
            here = first.stat(name)
            data = None if here is None else first.read(name, 0, here.size_bytes)
            can = data is not None and root.stat(name) is None
    except CheckpointError as failure:
        log.warning("step %d, which an earlier job left, is not carried on: %s", ref.step, failure)
        can = False
    if not all(agree(port, key, can, timeout_s)):
        return None
    log.info("step %d, which an earlier job left, is carried on", ref.step, extra={"ckptengine": {"step": ref.step}})
    return Landed(step=ref.step, attempt=ref.attempt, save=ref.save, record=manifest.files[rank], manifest=data)
