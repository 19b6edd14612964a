"""Scaling curves: the same workload over state sizes, tensor counts, ranks or intervals.

Run as a module: ``python -m bench.sweep state --json FILE``; each point is an ordinary run and the document a list
of them, which `report` draws.
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
from .main import run
from .options import SIZES, Options

GIB = 1 << 30
ENGINES = ("none", "pwrite", "ckptengine", "torch-save-fsync", "dcp-async", "torchsnapshot", "torch-checkpointing")
RANK_ENGINES = ("ckptengine", "dcp-save")


def points(kind: str, base: Options, values: Sequence[int] | None) -> list[tuple[int, Options]]:
    """The runs of a curve: what is varied, and the options of each point."""
    change = dataclasses.replace
    if kind == "state":
        sizes = values or (GIB // 10, GIB // 2, GIB, 2 * GIB, 4 * GIB)
        return [(n, change(base, workloads=("durable",), state_bytes=n)) for n in sizes]
    if kind == "tensors":
        counts = values or (1_000, 10_000, 100_000)
        return [(n, change(base, workloads=("many-small",), tensors=n)) for n in counts]
    if kind == "ranks":
        counts = values or (1, 2, 4)
        return [(n, change(base, workloads=("reshard",), ranks=(n, n))) for n in counts]
    if kind == "simulated":
        counts = values or (16, 128, 1_024)
        return [(n, change(base, workloads=("metadata",), simulated=(n, 1_000))) for n in counts]
    intervals = values or (1, 2, 5, 10)
    return [(n, change(base, workloads=("stall",), every=(n,))) for n in intervals]


KINDS = ("state", "tensors", "ranks", "simulated", "every")


def parser() -> argparse.ArgumentParser:
    """The command line of a sweep."""
    made = argparse.ArgumentParser(prog="bench.sweep", description="Measure one workload over a range of sizes.")
    made.add_argument("kind", choices=KINDS)
    made.add_argument("--values", default=None, help="comma-separated points; sizes may be written 512M")
    made.add_argument("--size", choices=SIZES, default="small")
    made.add_argument("--rivals", type=names, default=None)
    made.add_argument("--repetitions", type=int, default=1)
    made.add_argument("--threads", type=numbers, default=None)
    made.add_argument("--directory", default=None)
    made.add_argument("--json", required=True)
    return made


def main(argv: Sequence[str]) -> int:
    """Run the sweep and write its document; 2 where the request is unusable."""
    arguments = parser().parse_args(argv)
    engines = arguments.rivals or (RANK_ENGINES if arguments.kind in ("ranks", "simulated") else ENGINES)
    values = [size_bytes(part) for part in names(arguments.values)] if arguments.values else None
    try:
        base = Options(
            size=arguments.size,
            engines=engines,
            repetitions=arguments.repetitions,
            threads=arguments.threads,
            directory=arguments.directory,
        )
        runs: list[dict[str, Any]] = []
        for value, options in points(arguments.kind, base, values):
            runs.append({"value": value, "document": run(options)})
    except (CheckpointError, OSError) as error:
        print(f"bench.sweep: {error}", file=sys.stderr)
        return 2
    document = {"schema": 1, "sweep": arguments.kind, "points": runs}
    Path(arguments.json).write_text(json.dumps(document, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
