"""Weights that a deadline left beside the steps of a root, and when they are worth nothing any more.

``weights-only-step-N`` is a root of its own (see `ckptengine.operations.stopping.last_save`).  It goes once a whole
step that is at least as new is committed on the root and every byte of that holds; until then it may be all there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptengine.store import names
from ckptengine.store.lock import RootLock
from ckptengine.tiers import lease
from ckptengine.tiers.local import LocalTier
from ckptengine.tiers.loop import BlockingTier
from ckptengine.tiers.port import Entry

_PREFIX = "weights-only-step-"


@dataclass(frozen=True, slots=True)
class WeightsLeft:
    """The weights of one step: their objects, the manifest first; ``stays`` says why they must stay, if they must."""

    step: int
    folder: str
    objects: tuple[Entry, ...]
    why: str
    stays: bool

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.objects)


def plan_weights(tier: BlockingTier, newest: int | None, damage_of: Callable[[int], str]) -> tuple[WeightsLeft, ...]:
    """What is to become of the weights beside the steps on ``tier``; nothing is changed.

    ``newest``: the newest step of which every file is there.  ``damage_of`` says what is wrong with a step, "" where
    nothing is; it is asked where weights would go for the step.
    """
    by_folder: dict[str, list[Entry]] = {}
    for entry in tier.entries(_PREFIX):
        folder = entry.name.partition("/")[0]
        if names.WEIGHTS_PATTERN.match(folder):
            by_folder.setdefault(folder, []).append(entry)
    found = []
    for folder, objects in sorted(by_folder.items()):
        step = int(folder.removeprefix(_PREFIX))
        foreign = next((entry.name for entry in objects if not _is_ours(entry.name, step)), None)
        stays = True
        if foreign is not None:
            why = f"{foreign} is not part of it"
        elif newest is None or newest < step:
            why = f"no whole step from {step} on is committed"
        else:
            damage = damage_of(newest)
            stays = bool(damage)
            why = f"step {newest} is damaged: {damage}" if stays else f"step {newest} is whole and verified"
        objects.sort(key=lambda entry: (names.MANIFEST_PATTERN.search(entry.name) is None, entry.name))
        found.append(WeightsLeft(step, folder, tuple(objects), why, stays))
    return tuple(found)


def remove_weights(tier: BlockingTier, left: WeightsLeft) -> int:
    """Remove weights that need not stay; the bytes that were freed.

    Raises `RootInUse` where a live job is still at them.
    """
    root = tier.tier.root if isinstance(tier.tier, LocalTier) else None
    with _held(root / left.folder if root is not None else None):
        for entry in left.objects:
            tier.delete(entry.name)
        tier.sweep(f"{left.folder}/")
    return left.size_bytes


@contextlib.contextmanager
def _held(folder: Path | None) -> Iterator[None]:
    """The lock of a directory, which goes with it where nothing else is left there."""
    if folder is None:
        yield
        return
    with RootLock(folder / names.LOCK):
        yield
        (folder / names.LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files: they stay
            folder.rmdir()


def _is_ours(name: str, step: int) -> bool:
    _, _, rest = name.partition("/")
    folder, _, base = rest.partition("/")
    patterns = {
        names.ATTEMPTS: (names.ATTEMPT_PATTERN,),
        names.step_dir(step): (names.MANIFEST_PATTERN, names.RANK_PATTERN),
    }
    return lease.is_lease(rest) or any(pattern.match(base) for pattern in patterns.get(folder, ()))
