"""The records of attempts on every tier: put there before an attempt is used, and in front of every manifest."""

from __future__ import annotations

from collections.abc import Sequence

from ckptengine.errors import AlreadyExists, Superseded
from ckptengine.operations.draining.commit import Named
from ckptengine.store import names
from ckptengine.tiers.loop import BlockingTier


class Announced:
    """What attempts have recorded where saves land, on ``tiers[0]``; rank 0 only."""

    def __init__(self, tiers: Sequence[BlockingTier]) -> None:
        self._tiers = tuple(tiers)
        self._known: dict[int, tuple[Named, ...]] = {}

    def of(self, attempt: int) -> tuple[Named, ...]:
        """The claim and the records of an attempt, whichever tier has them; they never change."""
        if attempt not in self._known:
            for tier in self._tiers:
                found = _records(tier, attempt)
                if found:
                    self._known[attempt] = found
                    break
        return self._known.get(attempt, ())

    def everywhere(self, attempt: int) -> None:
        """Right after an attempt was claimed where saves land: claim it on every tier behind too.

        Raises `Superseded` where another job has claimed it there first.
        """
        for named in self.of(attempt):
            for tier in self._tiers[1:]:
                try:
                    tier.create(named.name, named.data)
                except AlreadyExists:
                    entry = tier.stat(named.name)
                    if entry is None or tier.read(named.name, 0, entry.size_bytes) != named.data:
                        raise Superseded(
                            f"{tier.label}: attempt {attempt} was claimed by another job; start this one again, "
                            f"or give it a root of its own"
                        ) from None


def _records(tier: BlockingTier, attempt: int) -> tuple[Named, ...]:
    found = []
    for entry in tier.entries(f"{names.ATTEMPTS}/"):
        match = names.ATTEMPT_PATTERN.search(entry.name)
        if match is not None and int(match[1]) == attempt:
            found.append(Named(entry.name, tier.read(entry.name, 0, entry.size_bytes)))
    # The claim first: without it a record means nothing.
    return tuple(sorted(found, key=lambda named: (not named.name.endswith(".claim"), named.name)))
