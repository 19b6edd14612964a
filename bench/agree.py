"""Whether two runs agree: ``python -m bench.agree A.json B.json``.

Two runs contradict each other where one tells two engines apart in one order and the other in the opposite one; what a
run cannot tell apart contradicts nothing.  Exit status 0 agree, 1 contradict, 2 unusable.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptengine.errors import CheckpointError

from .document import load
from .figures import ranked
from .statistics import LEAST_RELATIVE_NOISE, compare, flat, process_noise, ranking


def rankings(document: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Every ranking of a run, by what it ranks: groups from the best to the worst."""
    return {one.what: ranking(one.processes, one.resolution) for one in ranked(document)}


def orders(document: Mapping[str, Any]) -> dict[str, dict[tuple[str, str], int]]:
    """By what is ranked, for every pair of engines: -1 where the first is better, 1 the second, 0 not told apart."""
    found = {}
    for one in ranked(document):
        relative = max(LEAST_RELATIVE_NOISE, process_noise(one.processes))
        names = sorted(name for name, processes in one.processes.items() if flat(processes))
        found[one.what] = {
            (a, b): compare(one.processes[a], one.processes[b], one.resolution, relative)
            for a, b in itertools.combinations(names, 2)
        }
    return found


def contradictions(first: Mapping[tuple[str, str], int], second: Mapping[tuple[str, str], int]) -> list[str]:
    """Pairs that both runs tell apart, in opposite order."""
    return [f"{a} and {b} change places" for a, b in first if first[a, b] * second.get((a, b), 0) < 0]


def main(argv: Sequence[str]) -> int:
    """Compare two result files."""
    try:
        documents = [load(Path(name)) for name in argv]
        first, second = (orders(document) for document in documents)
    except (CheckpointError, ValueError) as error:
        print(f"bench.agree: {error}; it takes two result files", file=sys.stderr)
        return 2
    groups = rankings(documents[1])
    status = 0
    for what, order in first.items():
        if what not in second:
            continue
        found = contradictions(order, second[what])
        status |= bool(found)
        both = [pair for pair in order if pair in second[what]]
        told = sum(order[pair] == second[what][pair] != 0 for pair in both)
        verdict = "; ".join(found) or f"agree ({told} of {len(both)} pairs told apart in both)"
        print(f"{what}: {verdict}\n    {' < '.join(' = '.join(group) for group in groups[what])}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
