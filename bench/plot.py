"""Pictures of a result document: what each engine steals, and the course of one save (matplotlib)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptengine.errors import UnusableRequest

from .document import Document, describe_machine, figures_by_engine, samples_of
from .figures import stall_cuts, stall_samples
from .statistics import summarise

COLOURS = {"plain": "#c9d6df", "slow": "#f2b66d", "blocked": "#c0392b", "flight": "#7fb3d5", "durable": "#1e8449"}
SHOWN_STEPS = 6


def pyplot() -> Any:
    """matplotlib without a display; an error that says how to install it."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise UnusableRequest("--plot needs matplotlib: pip install 'ckptengine[bench]'") from error


def draw(document: Document, path: Path) -> None:
    """Bars of stolen time at each interval, and a timeline of one save per engine, into one picture.

    A run without `stall` is drawn as bars of what it has (time to durable, memory, restore).
    """
    plt = pyplot()
    cuts = [cut for cut in stall_cuts(document) if cut[2]]
    if not cuts:
        _draw_other(plt, document, path)
        return
    _, last_every, figures = cuts[-1]
    last = stall_samples(figures, last_every)
    medians = {name: found.median for name in figures if (found := summarise(last[name]["stolen_s"])) is not None}
    order = sorted(figures, key=lambda name: medians.get(name, float("inf")), reverse=True)
    figure = plt.figure(figsize=(14, 2 * (1.2 + 0.34 * len(figures))))
    grid = figure.add_gridspec(2, len(cuts))
    for column, (threads, every, runs_of) in enumerate(cuts):
        axis = figure.add_subplot(grid[0, column])
        samples = stall_samples(runs_of, every)
        _bars(axis, samples, order, f"every {every} step(s), {threads} thread(s)")
        if column:
            axis.set_yticklabels([])
    _timeline(figure.add_subplot(grid[1, :]), {name: figures[name] for name in order}, last_every)
    figure.suptitle(describe_machine(document), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, samples: dict[str, dict[str, list[float]]], order: list[str], where: str) -> None:
    for row, engine in enumerate(order):
        if engine not in samples:
            continue
        blocked, slower = summarise(samples[engine]["blocked_s"]), summarise(samples[engine]["slower_s"])
        stolen = summarise(samples[engine]["stolen_s"])
        if blocked is None or slower is None or stolen is None:
            continue
        axis.barh(row, blocked.median * 1e3, color=COLOURS["blocked"])
        axis.barh(row, max(0.0, slower.median) * 1e3, left=blocked.median * 1e3, color=COLOURS["slow"])
        axis.plot([stolen.low * 1e3, stolen.high * 1e3], [row, row], color="black", linewidth=0.8)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_title(f"stolen per save, {where}", fontsize=9)
    axis.set_xlabel("ms: blocked (red), slower steps (orange), all saves (line)", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_ylim(-0.7, len(order) - 0.3)


def _timeline(axis: Any, figures: dict[str, list[dict[str, Any]]], every: int) -> None:
    for row, (_, runs) in enumerate(figures.items()):
        block = next(block for block in runs[-1]["blocks"] if block["every"] == every)
        trace, saves = block["trace"], block["trace"]["saves"]
        if not saves:
            continue
        save = saves[0]
        zero = save["start_s"]
        steps = [step for step in trace["steps"] if step[0] >= zero][:SHOWN_STEPS]
        for number, (start, end, held) in enumerate(steps):
            shade = COLOURS["slow"] if start < save["durable_s"] else COLOURS["plain"]
            axis.barh(row, end - start, left=start - zero, height=0.5, color=shade, edgecolor="white", linewidth=0.6)
            if held > 0 and number == 0:
                axis.barh(row, held, left=end - zero - held, height=0.5, color=COLOURS["blocked"])
        axis.barh(row, save["returned_s"] - zero, height=0.5, color=COLOURS["blocked"])
        axis.barh(row + 0.34, save["durable_s"] - zero, height=0.12, color=COLOURS["flight"])
        axis.plot([save["durable_s"] - zero], [row + 0.34], marker="|", color=COLOURS["durable"], markersize=9)
    axis.set_yticks(range(len(figures)), list(figures), fontsize=8)
    axis.set_ylim(-0.7, len(figures) - 0.3)
    axis.set_title("one save: steps (orange while it is in flight), blocked (red), until durable (blue)", fontsize=9)
    axis.set_xlabel("seconds after the call", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)


def _draw_other(plt: Any, document: Document, path: Path) -> None:
    panels: list[tuple[str, dict[str, float]]] = []
    bars: tuple[tuple[str, str, Callable[[Any], list[float]]], ...] = (
        ("durable", "durable after (s)", lambda run: [save["durable_s"] for save in run["saves"]]),
        ("memory", "extra memory (MiB)", lambda run: [run["extra_bytes"] / (1 << 20)]),
        ("restore", "cold restore (s)", lambda run: [one["cold"]["seconds"] for one in run["restores"]]),
        ("many-small", "call (s)", lambda run: [save["call_s"] for save in run["saves"]]),
    )
    for workload, title, unit in bars:
        values = {}
        for engine, runs in figures_by_engine(samples_of(document, workload)).items():
            found = summarise(value for run in runs for value in unit(run))
            if found is not None:
                values[engine] = found.median
        if values:
            panels.append((title, values))
    if not panels:
        raise UnusableRequest("nothing to draw: --plot needs stall, durable, memory, restore or many-small")
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels, strict=True):
        order = sorted(values, key=lambda name: -values[name])
        axis.barh(order, [values[name] for name in order], color=COLOURS["flight"])
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(describe_machine(document), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
