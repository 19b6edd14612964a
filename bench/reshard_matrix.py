"""Every ordered pair of parallelisms, saved under one and restored under the other, compared element by element.

``python -m bench.reshard_matrix [--pairs N] [--vocabulary V] [--processes]``, from the root of the repository.  The
tests run a sample of this.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.reshard.processes import SCENARIOS
from tests.reshard.test_matrix import ALL
from tests.reshard.test_matrix import check as check_pair
from tests.reshard.test_processes import check as check_processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=0, help="how many pairs, drawn at random (default: all)")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[17, 127], help="rows of the embedding")
    parser.add_argument("--processes", action="store_true", help="also train under real ranks")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)
    pairs = list(itertools.product(ALL, ALL))
    if arguments.pairs:
        pairs = random.Random(0).sample(pairs, min(arguments.pairs, len(pairs)))
    failures = 0
    started_s = time.perf_counter()
    for number, (source, target) in enumerate(pairs):
        for vocabulary in arguments.vocabulary:
            failures += not _holds(
                f"{source} -> {target} ({vocabulary} rows)",
                lambda folder, s=source, t=target, v=vocabulary: check_pair(s, t, folder, v),
            )
        if number % 50 == 49:
            print(f"{number + 1} of {len(pairs)} pairs, {failures} failures, {time.perf_counter() - started_s:.0f} s")
    for scenario in SCENARIOS if arguments.processes else ():
        failures += not _holds(
            scenario,
            lambda folder, s=scenario: check_processes(s, folder),
        )
    print(f"{len(pairs)} pairs x {len(arguments.vocabulary)} vocabularies: {failures} failures")
    return int(failures > 0)


def _holds(what: str, run: object) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(Path(folder))  # type: ignore[operator]
        except Exception as error:
            print(f"FAILED {what}: {type(error).__name__}: {str(error)[:300]}")
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
