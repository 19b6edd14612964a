"""End to end under real ranks: whoever goes on, under whatever parallelism, goes on where the first run was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ckptengine as ce

from .processes import LAST, SAVED_AT, SCENARIOS

TOLERANCE = 2e-5
"""Relative: sums are taken in another order under another parallelism."""
FAST = ("fsdp", "tp-pp", "single", "fsdp1", "fsdp1-flat")


def losses_of(scenario: str, folder: Path) -> list[list[float]]:
    """The losses of every phase."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.reshard.processes", scenario, str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"losses-{n}.json").read_text()) for n in range(len(SCENARIOS[scenario]))]


def check(scenario: str, folder: Path) -> None:
    """The losses after the restore against those of the run that stayed; equal where the arithmetic is the same."""
    first, *others = losses_of(scenario, folder)
    stayed = first[SAVED_AT:]
    assert len(stayed) == LAST - SAVED_AT
    assert stayed[0] > 0
    assert len(set(first)) == LAST
    for (kind, world), losses in zip(SCENARIOS[scenario][1:], others, strict=True):
        if (kind, world) == SCENARIOS[scenario][0]:
            assert losses == stayed, (kind, world)
        assert losses == pytest.approx(stayed, rel=TOLERANCE), (kind, world)
    with ce.open(folder / "run", SAVED_AT) as saved:
        digests = {name: saved.digest(name) for name in saved.names()}
    for number in range(1, len(others) + 1):
        with ce.open(folder / f"again-{number}") as again:
            again.verify()
            assert {name: again.digest(name) for name in again.names()} == digests, SCENARIOS[scenario][number]


@pytest.mark.parametrize("scenario", FAST)
def test_training_goes_on_under_another_parallelism(scenario: str, tmp_path: Path) -> None:
    check(scenario, tmp_path)
