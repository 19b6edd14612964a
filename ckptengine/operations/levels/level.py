"""One tier among several: its records."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckptengine.errors import CheckpointError
from ckptengine.operations.drain import Drain
from ckptengine.operations.draining.commit import Named
from ckptengine.operations.draining.transfer import DrainFile
from ckptengine.operations.retain import Facts, Known
from ckptengine.policy.cost import CostHistory
from ckptengine.policy.interval import LastSave
from ckptengine.policy.keep import Keep
from ckptengine.store import names
from ckptengine.store.manifest import FileRecord
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier
from ckptengine.tiers.port import TierPort
from ckptengine.tiers.spec import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """One step that is committed on tier ``at``, as this rank knows it.

    ``files``: those that this rank carries on, by the number of the rank that wrote them: its own, and others' where a
    job of another size goes on.  ``manifest`` has its encoded bytes, on rank 0, and ``facts`` what retention goes by.
    ``all_the_way``: it goes to the root whatever the intervals say (an explicit save, or what an earlier job left).
    ``lies_on``: the tiers of those files that have come further than ``at``.  ``records``: what a node's own tier has
    of the attempt, where a rank other than 0 sees to it.
    """

    step: int
    attempt: int
    save: int
    files: Mapping[int, FileRecord]
    manifest: bytes | None
    all_the_way: bool = False
    at: int = 0
    lies_on: Mapping[int, int] = field(default_factory=dict)
    records: tuple[Named, ...] = ()
    facts: Facts | None = None

    @property
    def manifest_name(self) -> str:
        return f"{names.step_dir(self.step)}/{names.manifest(self.attempt, self.save)}"

    def drain_files(self, target: int, last: int) -> list[DrainFile]:
        """What this rank has to carry to tier ``target``, and on the ``last`` one to prove where it has come so far."""
        folder = names.step_dir(self.step)
        files = []
        for rank, record in self.files.items():
            on = self.lies_on.get(rank, self.at)
            if on < target or on == target == last:
                name = f"{folder}/{names.rank_file(rank, self.attempt, self.save)}"
                files.append(DrainFile(name, record.nbytes, record=record, is_there=on == target))
        return files


@dataclass(slots=True)
class Level:
    """One tier of a checkpointer, and what is known of the steps on it.

    ``own``: this node has seen that no other one shares it.  ``known``: the manifests that retention has seen there.
    """

    spec: Tier
    tier: TierPort
    flat: BlockingTier
    keep: Keep | None
    drain: Drain | None = None
    last: LastSave | None = None
    costs: CostHistory = field(default_factory=CostHistory)
    verified: set[int] = field(default_factory=set)
    known: Known = field(default_factory=Known)
    own: bool = False

    def has(self, landed: Landed) -> None:
        """A step is here as it was sent."""
        self.verified.add(landed.step)
        if landed.manifest is not None and landed.facts is not None:
            self.known.add(landed.manifest_name, landed.manifest, landed.facts)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory or host memory, which a node may have for itself."""
        return isinstance(self.tier, LocalTier)

    @property
    def is_lasting(self) -> bool:
        """Whether what is here survives a power cut."""
        return self.tier.abilities.survives_power_cut


@dataclass(frozen=True, slots=True)
class Way:
    """One step on its way: as far as tier ``reach``; ``arrived`` is told of each tier, ``tried`` of each try that
    failed and that another one follows, ``done`` of the end."""

    landed: Landed
    reach: int
    started_s: float
    arrived: Callable[[int], None]
    tried: Callable[[CheckpointError], None]
    done: concurrent.futures.Future[int]
