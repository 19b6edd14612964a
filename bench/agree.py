"""Whether two runs agree: ``python -m bench.agree A.json B.json``.

Two runs contradict each other where one tells two engines apart in one order and the other in the opposite one; what a
run cannot tell apart contradicts nothing.  Exit status 0 agree, 1 contradict, 2 unusable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptengine.errors import CheckpointError

from .document import figures_by_engine, load, samples_of
from .names import BASELINE
from .statistics import ranking
from .summaries import stall_samples


def rankings(document: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Every ranking of a run, by what it ranks."""
    found: dict[str, list[list[str]]] = {}
    figures = figures_by_engine(samples_of(document, "stall"))
    for every in sorted({block["every"] for runs in figures.values() for run in runs for block in run["blocks"]}):
        mine = stall_samples(figures, every)
        noise = max((abs(value) for value in mine.get(BASELINE, {}).get("stolen_s", ())), default=0.0)
        for key in ("blocked_s", "stolen_s", "durable_s"):
            found[f"stall every {every}: {key}"] = ranking({name: one[key] for name, one in mine.items()}, noise)
    others: tuple[tuple[str, Callable[[Any], list[float]]], ...] = (
        ("durable", lambda run: [save["durable_s"] for save in run["saves"]]),
        ("memory", lambda run: [run["extra_bytes"]]),
        ("restore", lambda run: [one["cold"]["seconds"] for one in run["restores"]]),
    )
    for workload, samples in others:
        figures = figures_by_engine(samples_of(document, workload))
        if figures:
            values = {name: [value for run in runs for value in samples(run)] for name, runs in figures.items()}
            found[workload] = ranking(values, 4 << 20 if workload == "memory" else 0.0)
    return found


def contradictions(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs that both rankings tell apart, in opposite order."""
    places = [{name: place for place, group in enumerate(one) for name in group} for one in (first, second)]
    names = sorted(places[0].keys() & places[1].keys())
    pairs = [(a, b) for a in names for b in names if a < b]
    return [(a, b) for a, b in pairs if (places[0][a] - places[0][b]) * (places[1][a] - places[1][b]) < 0]


def main(argv: Sequence[str]) -> int:
    """Compare two result files."""
    try:
        first, second = (rankings(load(Path(name))) for name in argv)
    except (CheckpointError, ValueError) as error:
        print(f"bench.agree: {error}; it takes two result files", file=sys.stderr)
        return 2
    status = 0
    for what in sorted(first.keys() & second.keys()):
        found = contradictions(first[what], second[what])
        status |= bool(found)
        print(f"{what}: {'; '.join(f'{a} and {b} change places' for a, b in found) or 'agree'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
