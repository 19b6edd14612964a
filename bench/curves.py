"""Scaling curves drawn from a sweep's document, and the same as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .document import describe_machine, figures_by_engine, samples_of
from .figures import stall_samples
from .plot import pyplot
from .statistics import Summary, summarise
from .table import Table, size, spread

Curve = dict[str, dict[int, Summary]]
"""By engine: the figure at each point."""

AXES = {
    "state": ("bytes of state", "durable after (s)"),
    "tensors": ("tensors", "call of a save (s)"),
    "ranks": ("ranks", "restore (s)"),
    "simulated": ("ranks, simulated", "metadata (bytes)"),
    "every": ("steps between saves", "time against no checkpoint"),
}


def _values(kind: str, document: Mapping[str, Any]) -> dict[str, list[float]]:
    workload = document["options"]["workloads"][0]
    figures = figures_by_engine(samples_of(document, workload))
    found: dict[str, list[float]] = {}
    if kind == "every":
        every = document["options"]["every"][0]
        return {engine: mine["ratio"] for engine, mine in stall_samples(figures, every).items()}
    for engine, runs in figures.items():
        if kind == "state":
            found.setdefault("raw pwrite", []).extend(save["limit_s"] for run in runs for save in run["saves"])
            found[engine] = [save["durable_s"] for run in runs for save in run["saves"]]
        elif kind == "tensors":
            found[engine] = [save["call_s"] for run in runs for save in run["saves"]]
        elif kind == "ranks":
            found[engine] = [seconds for run in runs for seconds in run["restores_s"]]
        else:
            found[engine] = [float(run["metadata_bytes"]) for run in runs]
    return found


def curve(sweep: Mapping[str, Any]) -> Curve:
    """The sweep's figure by engine and point."""
    found: Curve = {}
    for point in sweep["points"]:
        for engine, values in _values(sweep["sweep"], point["document"]).items():
            summary = summarise(values)
            if summary is not None:
                found.setdefault(engine, {})[point["value"]] = summary
    return found


def table(sweep: Mapping[str, Any]) -> Table:
    """One row per engine, one column per point."""
    horizontal, vertical = AXES[sweep["sweep"]]
    values = [point["value"] for point in sweep["points"]]
    head = [size(value) if sweep["sweep"] == "state" else f"{value:,}" for value in values]
    rows = [[engine, *(spread(points.get(value)) for value in values)] for engine, points in curve(sweep).items()]
    return Table(title=f"{vertical} over {horizontal}", columns=["engine", *head], rows=rows)


def draw(sweep: Mapping[str, Any], path: Path) -> None:
    """One line per engine, both axes logarithmic."""
    plt = pyplot()
    horizontal, vertical = AXES[sweep["sweep"]]
    figure, axis = plt.subplots(figsize=(8, 5))
    for engine, points in curve(sweep).items():
        places = sorted(points)
        axis.plot(places, [points[place].median for place in places], marker="o", label=engine)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)
    axis.legend(fontsize=7)
    axis.set_title(describe_machine(sweep["points"][0]["document"]), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
