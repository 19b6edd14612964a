"""Retention beneath a root while a job runs: after a commit, on rank 0, in the background."""

from __future__ import annotations

import logging

from ckptengine.errors import CheckpointError
from ckptengine.operations.retain import apply_retention, plan_retention
from ckptengine.policy.keep import Keep
from ckptengine.store.root import Root
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier, IoLoop

log = logging.getLogger("ckptengine")


class Retention:
    """Applies `Keep` to a local root."""

    def __init__(self, root: Root, keep: Keep) -> None:
        self._root, self._keep = root, keep
        self._loop = IoLoop(threads=1, name="ckptengine-retention")

    def after_commit(self) -> None:
        """Remove what ``keep`` drops.  A refusal is logged and tried again after the next commit: nothing is lost."""
        tier = BlockingTier(LocalTier(self._root.path), self._loop)
        try:
            apply_retention(tier, plan_retention(tier, self._keep))
        except CheckpointError as error:
            log.warning("old checkpoints beneath %s could not be removed: %s", self._root.path, error)
        finally:
            tier.close()

    def close(self) -> None:
        self._loop.close()
