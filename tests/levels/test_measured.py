"""Figures in the documents are those of the results, and a result says what it was held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import levels, levels_page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_quotes_the_results() -> None:
    said = " ".join((ROOT / "docs" / "tiers.md").read_text().split())
    quoted = levels_page.lines()
    assert quoted
    assert not [line for line in quoted if line not in said]


@pytest.mark.parametrize("what", ["restore", "stolen"])
def test_a_small_measurement_makes_a_line(what: str, tmp_path: Path) -> None:
    document = levels.document_of(what, 1 << 20, 1)
    (floor,) = document["floors"].values()
    assert isinstance(floor["met"], bool)
    (tmp_path / "one.json").write_text(json.dumps(document))
    (line,) = levels_page.lines(tmp_path)
    assert "floor" in line
