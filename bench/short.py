"""The results in one table, for the top of the page and for the README: from the newest run that has each figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .document import Document, describe_machine, figures_by_engine, samples_of
from .figures import stall_cuts, stall_samples
from .names import BASELINE, LIMIT
from .table import Table, number, size

Found = Sequence[tuple[str, Document]]
"""Names and documents, newest first."""
Values = Mapping[str, float]
"""A median by engine."""
SIZE = "real"


def _stall(document: Document, key: str) -> Values:
    """At a save every step and the fewest compute threads."""
    for _, every, runs_of in stall_cuts(document):
        if every == 1:
            return {name: statistics.median(one[key]) for name, one in stall_samples(runs_of, 1).items() if one[key]}
    return {}


def _others(document: Document, workload: str, of: Callable[[dict[str, Any]], list[float]]) -> Values:
    runs_of = figures_by_engine(samples_of(document, workload))
    values = {engine: [value for run in runs for value in of(run)] for engine, runs in runs_of.items()}
    return {engine: statistics.median(one) for engine, one in values.items() if one}


COLUMNS: tuple[tuple[str, Callable[[Document], Values], Callable[[float], str]], ...] = (
    ("blocked ms", lambda document: _stall(document, "blocked_s"), lambda value: number(value * 1e3)),
    ("stolen ms", lambda document: _stall(document, "stolen_s"), lambda value: number(value * 1e3)),
    ("durable after s", lambda document: _stall(document, "durable_s"), number),
    ("extra memory", lambda document: _others(document, "memory", lambda run: [run["extra_bytes"]]), size),
    (
        "cold restore s",
        lambda document: _others(document, "restore", lambda run: [one["cold"]["seconds"] for one in run["restores"]]),
        number,
    ),
)


def table(found: Found) -> Table | None:
    """Medians at the real size, one engine a row, the one that steals least first; None where there is no such run."""
    columns: list[tuple[str, Values, Callable[[float], str]]] = []
    used: dict[str, Document] = {}
    for head, of, shown in COLUMNS:
        for name, document in found:
            values = of(document) if "sweep" not in document and document["options"]["size"] == SIZE else {}
            if values:
                columns.append((head, values, shown))
                used[name] = document
                break
    if not columns:
        return None
    order = next((values for head, values, _ in columns if head == "stolen ms"), columns[0][1])
    engines = [name for name in dict.fromkeys(name for _, values, _ in columns for name in values) if name != BASELINE]
    engines.sort(key=lambda name: order.get(name, float("inf")))
    rows = [
        [name, *(shown(values[name]) if name in values else "-" for _, values, shown in columns)] for name in engines
    ]
    machines: dict[str, list[str]] = {}
    for name, document in used.items():
        machines.setdefault(describe_machine(document).splitlines()[0], []).append(name)
    return Table(
        title="1.5 GB of state, one compute thread, a save every step",
        columns=["engine", *(head for head, _, _ in columns)],
        rows=rows,
        notes=[
            f"{LIMIT}: as many bytes written by raw direct `pwrite`, the limit of the disk",
            *(f"{' and '.join(names)}: {machine}" for machine, names in machines.items()),
        ],
    )
