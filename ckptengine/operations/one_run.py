"""Whether the tiers in front of a root belong to it: what another job left there is neither mixed in nor restored."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import CheckpointError, Conflict, Damaged, UnreadableFormat
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import CommitRef, History
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.loop import BlockingTier

ANY = "*"
"""In the place of a run that cannot be told, as its records are damaged."""


def run_on(root: BlockingTier) -> str | None:
    """The run that a root is of; None where nothing was ever saved there."""
    try:
        newest = History(TierFiles(root)).newest_attempt()
    except (Damaged, UnreadableFormat):
        return ANY
    return None if newest is None else newest.run


def require_run(run: str | None, root: str, tiers: Sequence[BlockingTier]) -> None:
    """See that every checkpoint on ``tiers`` is of ``run``, that of the ``root`` behind them.

    An attempt is announced on the root before anything is saved in its name, so that checkpoints of a run which the
    root has never heard of come from another job.  Raises `Conflict`.
    """
    if run == ANY:
        return
    for tier in tiers:
        for ref, other in _runs_on(tier).items():
            if other != run:
                raise Conflict(
                    f"{tier.label} holds step {ref.step} of run {other!r}, which {root} knows nothing of: another job "
                    f"left it there. Give this job a tier of its own, or remove it; to go on from what is there, "
                    f"give it as start_from to a job with other tiers"
                )


def _runs_on(tier: BlockingTier) -> dict[CommitRef, str]:
    """The newest commit of each attempt on a tier, and the run that it is of."""
    newest: dict[int, CommitRef] = {}
    for ref in History(TierFiles(tier)).commits():
        newest[ref.attempt] = max(ref, newest.get(ref.attempt, ref))
    runs: dict[CommitRef, str] = {}
    for ref in newest.values():
        name = f"{names.step_dir(ref.step)}/{names.manifest(ref.attempt, ref.save)}"
        try:
            entry = tier.stat(name)
            if entry is None or entry.size_bytes > manifests.MANIFEST_LIMIT_BYTES:
                continue
            runs[ref] = manifests.decode(tier.read(name, 0, entry.size_bytes), f"{tier.label}/{name}").run
        except CheckpointError:
            continue  # damaged, or just removed: it is not restored either
    return runs
