"""What lies on tiers, step by step, for people: on a directory, in host memory, or behind a URL."""

from __future__ import annotations

from ckptengine.store import names
from ckptengine.store.history import CommitRef, History
from ckptengine.store.listing import StepEntry, StepState, entry_of
from ckptengine.store.manifest import Manifest, decode
from ckptengine.tiers.files import TierFiles
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import open_tier


def list_tier(path: str) -> list[StepEntry]:
    """Every step on the tier at ``path``, oldest first; manifests and sizes are looked at, not tensor bytes.

    Raises what opening and listing the place raises.
    """
    loop = IoLoop(threads=4)
    tier = BlockingTier(open_tier(path, loop, writable=False), loop)
    try:
        return _entries(tier)
    finally:
        tier.close()
        loop.close()


def _entries(tier: BlockingTier) -> list[StepEntry]:
    sizes = {entry.name: entry.size_bytes for entry in tier.entries("step-")}
    history = History(TierFiles(tier))
    line = history.line()
    newest = {commit.step: commit for commit in history.commits()}
    steps = {int(match[1]) for name in sizes if (match := names.STEP_PATTERN.match(name.partition("/")[0]))}
    entries = []
    for step in sorted(steps):
        folder = f"{names.step_dir(step)}/"
        nbytes = sum(size for name, size in sizes.items() if name.startswith(folder))
        if step in line:
            entries.append(_entry(tier, sizes, line[step], "committed", nbytes))
        elif step in newest:
            entries.append(_entry(tier, sizes, newest[step], "abandoned", nbytes))
        else:
            entries.append(StepEntry(step, "incomplete", nbytes, reason="no manifest: the save never committed here"))
    return entries


def _entry(tier: BlockingTier, sizes: dict[str, int], ref: CommitRef, state: StepState, nbytes: int) -> StepEntry:
    folder = f"{names.step_dir(ref.step)}/"

    def read() -> Manifest:
        name = folder + names.manifest(ref.attempt, ref.save)
        return decode(tier.read(name, 0, sizes[name]), f"{tier.label}/{name}")

    reason = "belongs to a line of history that was left behind" if state == "abandoned" else ""
    return entry_of(ref, state, read, lambda name: sizes.get(folder + name), lambda: nbytes, reason)
