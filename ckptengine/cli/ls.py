"""``ckptengine ls ROOT``."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence

from ckptengine.cli import parser
from ckptengine.cli.text import size_text, table
from ckptengine.errors import NotFound
from ckptengine.store.listing import StepEntry, list_steps
from ckptengine.store.root import Root


def main(argv: Sequence[str]) -> int:
    arguments = parser("ls", "List the checkpoints of a root: step, size, state, metrics.")
    arguments.add_argument("root", metavar="ROOT", help="the directory of a run")
    arguments.add_argument("--watch", action="store_true", help="list again every two seconds until interrupted")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    root = Root(options.root)
    if not root.path.exists():
        raise NotFound(f"no directory {options.root}")
    while True:
        entries = list_steps(root)
        sys.stdout.write(_json(options.root, entries) if options.json else _text(options.root, entries))
        sys.stdout.flush()
        if not options.watch:
            return 0
        time.sleep(2.0)


def _json(root: str, entries: list[StepEntry]) -> str:
    return json.dumps({"root": root, "steps": [dataclasses.asdict(entry) for entry in entries]}) + "\n"


def _text(root: str, entries: list[StepEntry]) -> str:
    if not entries:
        return f"{root}: no checkpoints\n"
    rows = [["step", "state", "size", "ranks", "tensors", "committed at", "metrics"]]
    for entry in entries:
        metrics = " ".join(f"{name}={value}" for name, value in entry.metrics.items())
        rows.append(
            [
                str(entry.step),
                entry.state,
                size_text(entry.nbytes),
                str(entry.world or "-"),
                str(entry.tensors or "-"),
                entry.created or "-",
                metrics or entry.reason,
            ]
        )
    return table(rows)
