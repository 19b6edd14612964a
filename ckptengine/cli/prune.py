"""``ckptengine prune ROOT``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ckptengine.cli import parser
from ckptengine.cli.text import size_text
from ckptengine.errors import NotFound
from ckptengine.operations.retain import apply_retention, plan_retention
from ckptengine.policy.keep import Keep
from ckptengine.sources.files import is_url
from ckptengine.store import names
from ckptengine.store.lock import RootLock
from ckptengine.tiers.loop import BlockingTier, IoLoop
from ckptengine.tiers.spec import open_tier


def main(argv: Sequence[str]) -> int:
    arguments = parser("prune", "Delete checkpoints that are not worth keeping; never the last good one.")
    arguments.add_argument("root", metavar="ROOT", help="the directory or URL of a run")
    arguments.add_argument("--keep-last", type=int, required=True, metavar="K", help="keep the K newest")
    arguments.add_argument("--keep-every", type=int, metavar="N", help="keep steps that are multiples of N too")
    arguments.add_argument("--dry-run", action="store_true", help="say what would be deleted; delete nothing")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    local = not is_url(options.root)
    if local and not Path(options.root).is_dir():
        raise NotFound(f"no directory {options.root}")
    keep = Keep(last=options.keep_last, every=options.keep_every)
    if local and not options.dry_run:
        with RootLock(Path(options.root) / names.LOCK):  # a live job's saves look like debris until they commit
            document = _prune(options.root, keep, dry_run=False)
    else:
        document = _prune(options.root, keep, dry_run=options.dry_run)
    sys.stdout.write(json.dumps(document) + "\n" if options.json else _text(document))
    return 0


def _prune(root: str, keep: Keep, *, dry_run: bool) -> dict[str, object]:
    alone = not is_url(root)  # then the lock is held, or would be
    loop = IoLoop()
    tier = BlockingTier(open_tier(root, loop, writable=not dry_run), loop)
    try:
        plan = plan_retention(tier, keep, alone=alone)
        freed = plan.size_bytes if dry_run else apply_retention(tier, plan)
    finally:
        tier.close()
        loop.close()
    removed = [{"step": one.ref.step, "size_bytes": one.size_bytes, "why": one.why} for one in plan.removals]
    return {"root": root, "dry_run": dry_run, "kept": list(plan.kept), "removed": removed, "freed_bytes": freed}


def _text(document: dict[str, object]) -> str:
    verb = "would delete" if document["dry_run"] else "deleted"
    lines = [
        f"{verb} step {one['step']} ({size_text(one['size_bytes'])}): {one['why']}"
        for one in document["removed"]  # type: ignore[attr-defined]
    ]
    freed = size_text(float(document["freed_bytes"]))  # type: ignore[arg-type]
    lines.append(f"{len(lines)} saves, {freed}; kept steps: {document['kept']}")
    return "\n".join(lines) + "\n"
