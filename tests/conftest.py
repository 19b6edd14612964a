"""What every test shares: the order of the folders, and properties judged by results, not by the clock.

The order is by cost: with two workers, whatever takes long must begin early; what is quick fills the gaps at the end.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

FIRST = ("checks", "faults", "levels", "tiers", "operations_convert", "bench", "sources")
"""Folders with tests that take seconds each, longest first; the others follow in the order of collection."""

settings.register_profile("fast", deadline=None)
settings.load_profile("fast")


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long folders first; the sort is stable, so a folder keeps its own order."""
    items.sort(key=_rank)
