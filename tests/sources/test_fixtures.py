"""Checkpoints written by the real frameworks, where they lie beside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptengine.sources.detect import open_source

from .reading import FIXTURES, compare, truth_of_json

CASES = sorted(str(path.parent.relative_to(FIXTURES)) for path in FIXTURES.glob("*/*/truth.json"))


@pytest.mark.skipif(not CASES, reason=f"no checkpoints in {FIXTURES.name} beside the repository")
@pytest.mark.parametrize("case", CASES or ["none"])
def test_equal_to_its_truth(case: str) -> None:
    folder: Path = FIXTURES / case
    compare(open_source(folder / "checkpoint"), truth_of_json(folder / "truth.json"))
