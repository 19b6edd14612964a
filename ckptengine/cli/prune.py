"""``ckptengine prune ROOT``."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptengine.cli import parser
from ckptengine.cli.meter import Meter
from ckptengine.cli.roots import require_root
from ckptengine.cli.text import counted, size_text
from ckptengine.errors import CheckpointError, NotFound, RootInUse, UnusableRequest
from ckptengine.operations.levels.policy_record import remove_unfinished
from ckptengine.operations.opening import open_any
from ckptengine.operations.retain import apply_retention, newest_whole, plan_retention
from ckptengine.operations.stopping.weights_left import WeightsLeft, plan_weights, remove_weights
from ckptengine.operations.verify import Progress, verify
from ckptengine.policy.keep import Keep
from ckptengine.sources.files import is_url
from ckptengine.store import names
from ckptengine.store.lock import RootLock
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import Tier, open_tier


def main(argv: Sequence[str]) -> int:
    arguments = parser("prune", "Delete checkpoints that are not worth keeping; never the last good one.")
    arguments.add_argument("root", metavar="ROOT", help="the directory or URL of a run")
    arguments.add_argument("--keep-last", type=int, required=True, metavar="K", help="keep the K newest")
    arguments.add_argument("--keep-every", type=int, metavar="N", help="keep steps that are multiples of N too")
    arguments.add_argument("--dry-run", action="store_true", help="say what would be deleted; delete nothing")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    for option, number in (("--keep-last", options.keep_last), ("--keep-every", options.keep_every)):
        if number is not None and number < 1:
            raise UnusableRequest(f"{option} {number}: a whole number from 1 on")
    local = not is_url(options.root)
    if local:
        require_root(options.root, "prune")
    keep = Keep(last=options.keep_last, every=options.keep_every)
    if local and not options.dry_run:
        with RootLock(Path(options.root) / names.LOCK):  # a live job's saves look like debris until they commit
            document = _prune(options.root, keep, dry_run=False)
            remove_unfinished(Path(options.root))
    else:
        document = _prune(options.root, keep, dry_run=options.dry_run)
    sys.stdout.write(json.dumps(document) + "\n" if options.json else _text(document))
    return 0


def _prune(root: str, keep: Keep, *, dry_run: bool) -> dict[str, Any]:
    alone = not is_url(root)  # then the lock is held, or would be
    loop = IoLoop()
    tier = BlockingTier(open_tier(root, loop, writable=not dry_run), loop)
    try:
        if not alone and not tier.entries():
            raise NotFound(f"there are no checkpoints at {tier.label}; a root is named without its step")
        plan = plan_retention(tier, keep, alone=alone)
        newest = None if plan.anchor is None else plan.anchor.step
        found: dict[int, str] = {}
        with Meter("verifying") as meter:
            damage_of = functools.partial(_damage_of, root, found, meter.progress)
            if plan.removals:  # nothing goes for a step of which not every byte holds
                plan = plan_retention(tier, keep, verified=newest_whole(tier, damage_of), alone=alone)
            weights = plan_weights(tier, newest, damage_of)
        freed = plan.size_bytes if dry_run else apply_retention(tier, plan)
        told = [_settle(tier, left, dry_run=dry_run) for left in weights]
    finally:
        tier.close()
        loop.close()
    removed = [{"step": one.ref.step, "size_bytes": one.size_bytes, "why": one.why} for one in plan.removals]
    freed += sum(one["size_bytes"] for one in told if one["removed"])
    return {
        "root": Tier(root).label,
        "dry_run": dry_run,
        "kept": list(plan.kept),
        "removed": removed,
        "damaged": [{"step": step, "why": why} for step, why in sorted(found.items()) if why],
        "weights": told,
        "freed_bytes": freed,
    }


def _damage_of(root: str, found: dict[int, str], progress: Progress, step: int) -> str:
    """What is wrong with a step of ``root``, "" where nothing is; every byte is read, once for all who ask."""
    if step not in found:
        try:
            source = open_any(root, step)
            try:
                problems, _ = verify(source, progress)
            finally:
                source.files.close()
        except CheckpointError as problem:
            problems = [problem]
        found[step] = str(problems[0]) if problems else ""
    return found[step]


def _settle(tier: BlockingTier, left: WeightsLeft, *, dry_run: bool) -> dict[str, Any]:
    """Remove weights that a deadline left, where they need not stay; what became of them."""
    removed, why = not left.stays, left.why
    if removed and not dry_run:
        try:
            remove_weights(tier, left)
        except RootInUse as live:
            removed, why = False, str(live)
    return {"folder": left.folder, "step": left.step, "size_bytes": left.size_bytes, "removed": removed, "why": why}


def _text(document: dict[str, Any]) -> str:
    verb = "would delete" if document["dry_run"] else "deleted"
    lines = [f"{verb} step {one['step']} ({size_text(one['size_bytes'])}): {one['why']}" for one in document["removed"]]
    lines += [f"kept step {one['step']}, which is damaged: {one['why']}" for one in document["damaged"]]
    for one in document["weights"]:
        what = f"{one['folder']} ({size_text(one['size_bytes'])}): {one['why']}"
        lines.append(f"{verb} {what}" if one["removed"] else f"kept {what}")
    deleted = len(document["removed"]) + sum(one["removed"] for one in document["weights"])
    freed = "would be freed" if document["dry_run"] else "freed"
    kept = ", ".join(map(str, document["kept"])) or "none"
    size = size_text(document["freed_bytes"])
    lines.append(f"{verb} {counted(deleted, 'save')}, {size} {freed}; steps that stay: {kept}")
    return "\n".join(lines) + "\n"
