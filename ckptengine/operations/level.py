"""One tier among several: its records."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptengine.operations.drain import Drain
from ckptengine.policy.cost import CostHistory
from ckptengine.policy.interval import LastSave
from ckptengine.policy.keep import Keep
from ckptengine.store.manifest import FileRecord
from ckptengine.tiers.loop import BlockingTier
from ckptengine.tiers.port import TierPort
from ckptengine.tiers.spec import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """One step that is committed on the first tier, as this rank knows it.

    ``record`` is that of this rank's file; ``manifest`` its encoded bytes, on rank 0.  ``all_the_way``: it goes to the
    root whatever the intervals say (an explicit save).
    """

    step: int
    attempt: int
    save: int
    record: FileRecord
    manifest: bytes | None
    all_the_way: bool = False


@dataclass(slots=True)
class Level:
    """One tier of a checkpointer, and what is known of the steps on it."""

    spec: Tier
    tier: TierPort
    flat: BlockingTier
    keep: Keep | None
    drain: Drain | None = None
    last: LastSave | None = None
    costs: CostHistory = field(default_factory=CostHistory)
    verified: set[int] = field(default_factory=set)

    @property
    def is_lasting(self) -> bool:
        """Whether what is here survives a power cut."""
        return self.tier.abilities.survives_power_cut


@dataclass(frozen=True, slots=True)
class Way:
    """One step on its way: as far as tier ``reach``; ``arrived`` is told of each tier, ``done`` of the end."""

    landed: Landed
    reach: int
    started_s: float
    arrived: Callable[[int], None]
    done: concurrent.futures.Future[int]
