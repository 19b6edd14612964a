"""Applying `Keep` to a tier: plan first, as data; then delete, manifests before what they name.

Removed is only what carries the names of rank files and manifests, and only what can never count again:

- commits of the current line of history that ``keep`` drops;
- commits that a newer save of the same step has replaced, and those of abandoned lines;
- rank files without a manifest, of attempts that are over or of saves older than the newest good one; all of them
  where the caller holds the place, so that nobody can still be at it.

The newest good checkpoint and all that is newer stays, whatever ``keep`` says; where none is good, everything does.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptengine import native
from ckptengine.errors import CheckpointError
from ckptengine.policy.keep import Keep, StepInfo
from ckptengine.store import manifest as manifests
from ckptengine.store import names
from ckptengine.store.history import CommitRef, History
from ckptengine.store.manifest import Manifest
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.loop import BlockingTier
from ckptengine.tiers.port import Entry


@dataclass(frozen=True, slots=True)
class Removal:
    """One save to remove: its objects, manifest first, and why."""

    ref: CommitRef
    objects: tuple[Entry, ...]
    why: str

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.objects)


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays and what goes.  ``anchor`` is the newest good commit, without which nothing may be removed."""

    anchor: CommitRef | None
    kept: tuple[int, ...]
    removals: tuple[Removal, ...]
    protected: frozenset[int] = frozenset()
    alone: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(removal.size_bytes for removal in self.removals)


class Facts(NamedTuple):
    """What of a manifest retention goes by; ``sizes`` are those of its rank files."""

    step: int
    created: str
    metrics: Mapping[str, Any]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> Facts:
        return cls(manifest.step, manifest.created, manifest.metrics, tuple(one.nbytes for one in manifest.files))


class Known:
    """The facts of manifests that were seen before, by name and the CRC of their bytes: to parse one takes long."""

    def __init__(self) -> None:
        self._facts: dict[str, tuple[int, Facts]] = {}

    def add(self, name: str, data: bytes, facts: Facts) -> None:
        self._facts[name] = native.crc64(data), facts

    def facts(self, name: str, data: bytes, where: str) -> Facts:
        """Of the manifest ``data``; raises as `ckptengine.store.manifest.decode` does."""
        known = self._facts.get(name)
        if known is None or known[0] != native.crc64(data):
            self.add(name, data, Facts.of(manifests.decode(data, where)))
        return self._facts[name][1]

    def keep(self, names: Collection[str]) -> None:
        """Forget all others."""
        self._facts = {name: held for name, held in self._facts.items() if name in names}


@dataclass(slots=True)
class _Save:
    """The objects of one save of one step."""

    manifest: Entry | None = None
    files: dict[int, Entry] = field(default_factory=dict)


def plan_retention(
    tier: BlockingTier,
    keep: Keep,
    *,
    verified: Collection[int] | None = None,
    protected: Collection[int] = (),
    ranks: Collection[int] | None = None,
    alone: bool = False,
    known: Known | None = None,
) -> RetentionPlan:
    """What ``keep`` removes from ``tier``; nothing is changed.

    ``verified``: steps of which more is known than that every file is there in its size; only such a step can be the
    newest good one (None: sizes are believed).  ``protected``: steps that must stay, as a drain still reads them.
    ``ranks``: those whose files lie here, for a tier that belongs to one node of several (None: all).  ``alone``: the
    caller holds the place's lock, so that what is not committed never will be.  ``known``: manifests seen before.
    """
    known = Known() if known is None else known
    saves = _saves(tier.entries("step-"))
    known.keep({save.manifest.name for save in saves.values() if save.manifest is not None})
    history = History(TierFiles(tier))
    visible = history.visible()
    line = {ref.step: ref for ref in visible}
    read = {ref: _read(tier, ref, saves, ranks, known) for ref in line.values()}
    good = [step for step, ref in line.items() if read[ref] is not None and (verified is None or step in verified)]
    if not good:
        return RetentionPlan(None, tuple(sorted(line)), ())
    anchor = line[max(good)]
    kept = keep.select([_info(ref, read[ref], anchor) for ref in line.values()]) | {
        step for step in protected if step in line
    }
    newest = max((*history.attempt_numbers(), *(ref.attempt for ref in saves)))
    counting, stand_ins = set(line.values()), set(visible)
    removals = []
    for ref in sorted(saves):
        if ref in counting:
            why = None if ref.step in kept else "not kept by the policy"
        elif ref in stand_ins:  # a restore falls back on it where what replaced it is damaged
            why = "replaced by a newer save of the step" if ref.step <= anchor.step else None
        else:
            why = _why(ref, saves[ref], anchor, newest, alone)
        if why is not None and ref.step not in protected:
            removals.append(Removal(ref, _objects(saves[ref]), why))
    return RetentionPlan(anchor, tuple(sorted(kept)), tuple(removals), frozenset(protected), alone)


def newest_whole(tier: BlockingTier, damage_of: Callable[[int], str]) -> set[int]:
    """The newest step of the current line in which ``damage_of`` finds nothing wrong, as a set; empty where none is."""
    steps = sorted(History(TierFiles(tier)).line(), reverse=True)
    whole = next((step for step in steps if not damage_of(step)), None)
    return set() if whole is None else {whole}


def apply_retention(tier: BlockingTier, plan: RetentionPlan) -> int:
    """Carry ``plan`` out; the bytes that were freed.

    Stops with an error where the checkpoint that the plan relies on is gone.  Interrupted anywhere, what is left is
    found again by the next plan.
    """
    if plan.anchor is None:
        return 0
    freed_bytes = 0
    for removal in plan.removals:
        _must_be_there(tier, plan.anchor)
        for entry in removal.objects:
            tier.delete(entry.name)
            freed_bytes += entry.size_bytes
    tier.sweep("step-", lambda name: _may_be_in_use(name, plan))
    return freed_bytes


def _may_be_in_use(name: str, plan: RetentionPlan) -> bool:
    """Whether somebody may still be sending the object ``name``: it is newer than the newest good save."""
    assert plan.anchor is not None
    if plan.alone:
        return False
    folder, _, base = name.partition("/")
    step, rank = names.STEP_PATTERN.match(folder), names.RANK_PATTERN.match(base) or names.MANIFEST_PATTERN.match(base)
    if step is None or rank is None or int(step[1]) in plan.protected:
        return True
    attempt, save = int(rank[rank.re.groups - 1]), int(rank[rank.re.groups])
    return (attempt, save) > (plan.anchor.attempt, plan.anchor.save)


def _saves(entries: Collection[Entry]) -> dict[CommitRef, _Save]:
    saves: dict[CommitRef, _Save] = {}
    for entry in entries:
        folder, _, base = entry.name.partition("/")
        step = names.STEP_PATTERN.match(folder)
        if step is None:
            continue
        manifest, rank = names.MANIFEST_PATTERN.match(base), names.RANK_PATTERN.match(base)
        if manifest is not None:
            ref = CommitRef(int(step[1]), int(manifest[1]), int(manifest[2]))
            saves.setdefault(ref, _Save()).manifest = entry
        elif rank is not None:
            ref = CommitRef(int(step[1]), int(rank[2]), int(rank[3]))
            saves.setdefault(ref, _Save()).files[int(rank[1])] = entry
    return saves


def _read(
    tier: BlockingTier,
    ref: CommitRef,
    saves: Mapping[CommitRef, _Save],
    ranks: Collection[int] | None,
    known: Known,
) -> Facts | None:
    """Those of the manifest, if it can be read and every file that it names is there in its size."""
    save = saves.get(ref)
    if save is None or save.manifest is None:
        return None
    try:
        data = tier.read(save.manifest.name, 0, save.manifest.size_bytes)
        facts = known.facts(save.manifest.name, data, f"{tier.label}/{save.manifest.name}")
    except CheckpointError:
        return None  # damaged: then it is not good, which is all that matters here
    there = {rank: entry.size_bytes for rank, entry in save.files.items()}
    wanted = [(rank, nbytes) for rank, nbytes in enumerate(facts.sizes) if ranks is None or rank in ranks]
    complete = all(there.get(rank) == nbytes for rank, nbytes in wanted)
    return facts if complete and facts.step == ref.step else None


def _info(ref: CommitRef, facts: Facts | None, anchor: CommitRef) -> StepInfo:
    if facts is None or ref.step > anchor.step:
        return StepInfo(ref.step, good=False)
    metrics = {name: float(value) for name, value in facts.metrics.items() if isinstance(value, int | float)}
    return StepInfo(ref.step, committed_s=_created_s(facts.created), metrics=metrics)


def _created_s(created: str) -> float | None:
    try:
        return datetime.datetime.fromisoformat(created).timestamp()
    except ValueError:
        return None


def _why(ref: CommitRef, save: _Save, anchor: CommitRef, newest: int, alone: bool) -> str | None:
    """Why a save that is no part of the current line of history goes, or None where it stays."""
    if save.manifest is not None:
        return "part of an abandoned line of history" if ref.attempt < newest else None
    if ref.attempt < newest:
        return "never committed, and its attempt is over"
    if alone:
        return "never committed, and its job is gone"
    older = ref.attempt == anchor.attempt and ref.save < anchor.save
    return "never committed, and older than the newest good checkpoint" if older else None


def _objects(save: _Save) -> tuple[Entry, ...]:
    first = (save.manifest,) if save.manifest is not None else ()
    return (*first, *(entry for _, entry in sorted(save.files.items())))


def _must_be_there(tier: BlockingTier, anchor: CommitRef) -> None:
    name = f"{names.step_dir(anchor.step)}/{names.manifest(anchor.attempt, anchor.save)}"
    if tier.stat(name) is None:
        raise CheckpointError(
            f"{tier.label}/{name} is gone while older checkpoints were being removed; nothing more is removed: "
            f"find out who else deletes there"
        )
