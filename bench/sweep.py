"""Scaling curves: the same workload over state sizes, tensor counts, ranks or intervals.

Run as a module: ``python -m bench.sweep state --json FILE``; each point is an ordinary run and the document a list
of them, which `report` draws.  Like an ordinary run it goes on from its journals (one for each point) when it was cut
off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptengine.errors import CheckpointError

from .arguments import names, numbers, size_bytes
from .main import print_progress, run
from .options import SIZES, Options

GIB = 1 << 30
ENGINES = {
    "state": ("ckptengine", "torch-save-fsync", "dcp-async"),
    "tensors": ("ckptengine", "torch-save-fsync", "safetensors", "dcp-async"),
    "ranks": ("ckptengine", "dcp-save"),
    "simulated": ("ckptengine", "dcp-save"),
    "every": ("none", "ckptengine", "torch-save-fsync", "dcp-async", "torch-checkpointing"),
}
"""What a curve is drawn for where nothing else is asked: few enough that each curve takes about four minutes."""


def points(kind: str, base: Options, values: Sequence[int] | None) -> list[tuple[int, Options]]:
    """The runs of a curve: what is varied, and the options of each point."""
    change = dataclasses.replace
    if kind == "state":
        sizes = values or (GIB // 10, GIB // 2, GIB, 4 * GIB)
        return [(n, change(base, workloads=("durable",), state_bytes=n)) for n in sizes]
    if kind == "tensors":
        counts = values or (1_000, 10_000, 50_000)
        return [(n, change(base, workloads=("many-small",), tensors=n)) for n in counts]
    if kind == "ranks":
        counts = values or (1, 2, 4)
        return [(n, change(base, workloads=("reshard",), ranks=(n, n))) for n in counts]
    if kind == "simulated":
        counts = values or (16, 128, 1_024)
        return [(n, change(base, workloads=("metadata",), simulated=(n, 1_000))) for n in counts]
    intervals = values or (1, 2, 5, 10)
    return [(n, change(base, workloads=("stall",), every=(n,))) for n in intervals]


def parser() -> argparse.ArgumentParser:
    """The command line of a sweep."""
    made = argparse.ArgumentParser(prog="bench.sweep", description="Measure one workload over a range of sizes.")
    made.add_argument("kind", choices=tuple(ENGINES))
    made.add_argument("--values", default=None, help="comma-separated points; sizes may be written 512M")
    made.add_argument("--size", choices=SIZES, default="small")
    made.add_argument("--rivals", type=names, default=None)
    made.add_argument("--repetitions", type=int, default=1)
    made.add_argument(
        "--saves", type=int, default=None, help="measured saves per process (default: 1 for state, tensors)"
    )
    made.add_argument("--threads", type=numbers, default=None)
    made.add_argument("--directory", default=None)
    made.add_argument("--json", required=True)
    return made


def main(argv: Sequence[str]) -> int:
    """Run the sweep and write its document; 2 where the request is unusable."""
    arguments = parser().parse_args(argv)
    engines = arguments.rivals or ENGINES[arguments.kind]
    saves = arguments.saves or (1 if arguments.kind in ("state", "tensors") else None)
    target = Path(arguments.json)
    values = [size_bytes(part) for part in names(arguments.values)] if arguments.values else None
    try:
        base = Options(
            size=arguments.size,
            engines=engines,
            repetitions=arguments.repetitions,
            saves=saves,
            threads=arguments.threads,
            directory=arguments.directory,
        )
        runs: list[dict[str, Any]] = []
        for value, options in points(arguments.kind, base, values):
            print_progress(f"{arguments.kind} {value}")
            runs.append({"value": value, "document": run(options, part(target, value))})
    except (CheckpointError, OSError) as error:
        print(f"bench.sweep: {error}", file=sys.stderr)
        return 2
    document = {"schema": 1, "sweep": arguments.kind, "points": runs}
    target.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    for point in runs:
        part(target, point["value"]).with_name(f"{part(target, point['value']).name}.journal").unlink(missing_ok=True)
    return 0


def part(target: Path, value: int) -> Path:
    """The name beside which the journal of one point lies."""
    return target.with_name(f"{target.name}.{value}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
