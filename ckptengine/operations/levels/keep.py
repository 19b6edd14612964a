"""What each tier of a checkpointer keeps, applied when a step has come as far as it goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ckptengine.errors import CheckpointError
from ckptengine.operations.levels.held import Held
from ckptengine.operations.levels.level import Level
from ckptengine.operations.levels.node import Node
from ckptengine.operations.retain import apply_retention, plan_retention

log = logging.getLogger("ckptengine")


def apply_keeps(levels: Sequence[Level], upto: int, *, held: Held, node: Node, rank: int) -> None:
    """Apply the policy of each of ``levels`` up to number ``upto``; failures are told, and leave too much behind.

    A tier that nodes have each for themselves is seen to by one rank of each node, every other one by rank 0.
    """
    for number, level in enumerate(levels[: upto + 1]):
        last = number == len(levels) - 1
        if level.keep is None or not (rank == 0 or (level.own and not last)):
            continue
        behind = None if last else levels[number + 1].drain
        verified = frozenset(level.verified)  # before what is protected: what comes later is neither
        try:
            held.check(level)
            plan = plan_retention(
                level.flat,
                level.keep,
                verified=verified,
                protected=behind.pending if behind is not None else (),
                ranks=node.ranks if level.is_directory and not last else None,
                known=level.known,
            )
            apply_retention(level.flat, plan)
        except CheckpointError as failure:
            log.warning("retention on %s stopped: %s", level.spec.label, failure)
