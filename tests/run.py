"""`make test`: every test, on as many workers as there are cores, at most two; arguments go on to pytest.

`python -m tests.run` runs everything, `python -m tests.run tests/state -x` that folder up to the first failure.
"""

from __future__ import annotations

import os
import sys

import pytest

WORKERS = 2
"""More are no faster: the tests write to one disk, and the fast suite is meant for two cores."""


def main(arguments: list[str]) -> int:
    """Run pytest; its exit status."""
    # Workers share the cores; torch and BLAS would each start a thread per core in every one of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = arguments if any(not word.startswith("-") for word in arguments) else [*arguments, "tests"]
    workers = min(WORKERS, os.cpu_count() or 1)
    return int(pytest.main(["-n", str(workers), "--dist", "worksteal", "--durations", "25", *chosen]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
