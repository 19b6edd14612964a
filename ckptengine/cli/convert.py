"""``ckptengine convert SRC DST --to FORMAT``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ckptengine.cli import parser
from ckptengine.cli.meter import Meter
from ckptengine.cli.text import counted, parse_size, size_text
from ckptengine.errors import UnusableRequest
from ckptengine.operations.convert import Shard, TargetDiffers, convert
from ckptengine.operations.converting.plan import FORMATS, Plan
from ckptengine.sources.writer import Layout


def main(argv: Sequence[str]) -> int:
    arguments = parser("convert", "Convert a checkpoint of any format to another format or layout.")
    arguments.add_argument("source", metavar="SRC", help="the checkpoint: PATH, URL or PATH@STEP")
    arguments.add_argument("target", metavar="DST", help="where to write; must not exist")
    arguments.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    arguments.add_argument("--layout", metavar="dp=4,tp=2,...", help="the parallel layout of the target")
    arguments.add_argument("--rules", metavar="FILE|PRESET", help="what the pieces of the tensors mean")
    arguments.add_argument("--dry-run", action="store_true", help="print what would be read and written; write nothing")
    arguments.add_argument("--verify", action="store_true", help="read the target again and compare digests")
    arguments.add_argument("--memory", default="1GiB", metavar="SIZE", help="bound of memory (default 1GiB)")
    engine = arguments.add_mutually_exclusive_group()
    engine.add_argument("--workers", type=int, metavar="N", help="threads (default: by the machine)")
    engine.add_argument("--dask", metavar="ADDRESS", help="a dask scheduler whose workers do the work")
    arguments.add_argument("--shard", metavar="I/N", help="do part I (0 to N-1) of N; the last one that ends commits")
    arguments.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the format")
    arguments.add_argument("--json", action="store_true", help="print one JSON document")
    options = arguments.parse_args(argv)
    try:
        plan = _convert(options)
    except TargetDiffers as found:  # --verify found what it looks for
        sys.stderr.write(f"ckptengine convert: {found}\n")
        return 1
    sys.stdout.write(json.dumps(plan.to_json()) + "\n" if options.json else _text(plan))
    return 0


def _convert(options: argparse.Namespace) -> Plan:
    with Meter("converting") as meter:
        return convert(
            options.source,
            options.target,
            to=options.to,
            layout=None if options.layout is None else Layout.parse(options.layout),
            rules=options.rules,
            dry_run=options.dry_run,
            verify=options.verify,
            memory_bytes=parse_size(options.memory),
            workers=options.workers,
            shard=None if options.shard is None else Shard.parse(options.shard),
            dask=options.dask,
            options=dict(map(_option, options.option)),
            progress=meter.progress,
        )


def _option(text: str) -> tuple[str, Any]:
    """``key=value``; numbers, sizes like 4MiB, true, false and none mean themselves."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UnusableRequest(f"option {text!r}: write it as KEY=VALUE")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return key, words[value.lower()]
    if key.endswith("_bytes") or value.isdecimal():
        return key, parse_size(value)
    return key, value


def _text(plan: Plan) -> str:
    step = "" if plan.step is None else f", step {plan.step}"
    layout = ",".join(f"{axis}={degree}" for axis, degree in plan.layout.items() if degree is not None)
    lines = [
        f"{plan.source} ({plan.source_format}{step}) -> {plan.target} ({plan.format}{', ' + layout if layout else ''})",
        f"cover   each element of {counted(plan.covered, 'tensor')} is stored exactly once",
        f"read    {size_text(plan.read_bytes)} of {counted(plan.tensors, 'tensor')}",
        f"write   {size_text(plan.write_bytes)} in {counted(plan.files, 'file')}, {counted(plan.units, 'work unit')}",
        f"memory  at most {size_text(plan.peak_memory_bytes)} with {counted(plan.workers, 'worker')}",
    ]
    if plan.state == "committed":
        compared = f"{plan.compared} tensors equal those of the source"
        lines.append(f"digests {compared if plan.compared else 'the source records none to compare with'}")
        if plan.verified or plan.unverified:
            rest = f"; {plan.unverified} are not there as they were" if plan.unverified else ""
            lines.append(f"verify  {plan.verified} tensors read back equal what was converted{rest}")
    lines.append(
        {"planned": "nothing was written", "committed": "done"}.get(plan.state, "other shards are not done yet")
    )
    return "\n".join(lines) + "\n"
