"""``ckptengine ls ROOT``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptengine.cli import parser
from ckptengine.cli.roots import require_root
from ckptengine.cli.text import number_text, size_text, table
from ckptengine.errors import CheckpointError, NotFound
from ckptengine.operations.levels.policy_record import read_policy
from ckptengine.operations.levels.tier_listing import list_tier
from ckptengine.sources.files import open_files
from ckptengine.store.listing import StepEntry, list_steps
from ckptengine.store.root import Root
from ckptengine.tiers.redact import is_url
from ckptengine.tiers.spec import Tier

_ROOT = "root"


def main(argv: Sequence[str]) -> int:
    arguments = parser("ls", "List the checkpoints of a root: step, size, state, tiers, metrics.")
    arguments.add_argument("root", metavar="ROOT", help="the directory or URL of a run")
    arguments.add_argument(
        "--tier", action="append", default=[], metavar="PATH", help="a tier in front of it, beside those that are known"
    )
    arguments.add_argument("--watch", action="store_true", help="list again every two seconds until interrupted")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    if not is_url(options.root):
        require_root(options.root, "ls")
    shown = Tier(options.root).label
    while True:
        rows, troubles = _listed(options.root, options.tier)
        if is_url(options.root) and not (rows or troubles or options.watch):
            with contextlib.closing(open_files(options.root)) as files:
                files.entries()  # raises where the place cannot be reached, which listing passes over
            raise NotFound(f"there are no checkpoints at {shown}; a root is named without its step")
        sys.stdout.write(_json(shown, rows, troubles) if options.json else _text(shown, rows, troubles))
        sys.stdout.flush()
        if not options.watch:
            return 0
        time.sleep(2.0)


def _listed(root: str, tiers: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each step that the root or a tier in front of it has, and the tiers that could not be listed."""
    entries = list_tier(root) if is_url(root) else list_steps(Root(root))
    rows = {entry.step: _row(entry, entry.state, _ROOT) for entry in entries}
    troubles: dict[str, str] = {}
    for path in dict.fromkeys([*_known_tiers(root), *tiers]):
        tier = Tier(path)
        try:
            found = list_tier(path)
        except CheckpointError as error:
            troubles[tier.label] = str(error)
            continue
        for entry in found:
            # Host memory is lost with the power: nothing there counts as committed.
            state = "captured" if tier.is_memory and entry.state == "committed" else entry.state
            row = rows.setdefault(entry.step, _row(entry, state, tier.label))
            if entry.state != "committed" or tier.label in row["tiers"]:
                continue
            row["tiers"].insert(len(row["tiers"]) - (_ROOT in row["tiers"]), tier.label)
            if row["state"] in ("incomplete", "captured") and state == "committed":
                row.update(_row(entry, state, ""), tiers=row["tiers"])
    return [rows[step] for step in sorted(rows)], troubles


def _row(entry: StepEntry, state: str, label: str) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "state": state, "tiers": [label] if entry.state == "committed" else []}


def _known_tiers(root: str) -> list[str]:
    """The tiers in front of a root as its newest job recorded them; those behind URLs may need credentials."""
    try:
        labels = read_policy(Path(root))["places"][:-1] if not is_url(root) else []
    except (CheckpointError, KeyError, TypeError):
        return []
    return [label for label in labels if isinstance(label, str) and label and not _is_remote(label)]


def _is_remote(label: str) -> bool:
    tier = Tier(label)
    return tier.local_path is None and not tier.is_memory


def _json(root: str, rows: list[dict[str, Any]], troubles: Mapping[str, str]) -> str:
    return json.dumps({"root": root, "steps": rows, "troubles": dict(troubles)}) + "\n"


def _text(root: str, rows: list[dict[str, Any]], troubles: Mapping[str, str]) -> str:
    notes = "".join(f"{label} cannot be listed: {trouble}\n" for label, trouble in troubles.items())
    if not rows:
        return f"{root}: no checkpoints\n{notes}"
    lines = [["step", "state", "size", "ranks", "tensors", "committed at", "tiers", "metrics"]]
    for row in rows:
        metrics = " ".join(f"{name}={number_text(value)}" for name, value in row["metrics"].items())
        lines.append(
            [
                str(row["step"]),
                row["state"],
                size_text(row["nbytes"]),
                str(row["world"] or "-"),
                str(row["tensors"] or "-"),
                row["created"] or "-",
                ",".join(row["tiers"]) or "-",
                metrics or row["reason"],
            ]
        )
    return table(lines) + notes
