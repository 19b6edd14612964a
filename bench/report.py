"""Writes docs/benchmarks.md and its pictures from the JSON under bench/results/; no figure in it is typed by hand.

``python -m bench.report [--check]``: with ``--check`` nothing is written, and the exit status is 1 where the page is
not what the results give.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import curves
from .document import configurations, describe_machine, figures_by_engine, samples_of
from .names import BASELINE, LIMIT, OURS
from .plot import draw
from .statistics import summarise
from .summaries import stall_samples, tables

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PAGE = DOCS / "benchmarks.md"


def documents(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every result, newest first, by file name."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"), reverse=True)]


def rivals_that_are_better(document: Mapping[str, Any]) -> list[str]:
    """Every figure in which a rival's median is better than ours: said plainly, found by this function."""
    found: list[str] = []

    def compare(what: str, values: Mapping[str, Sequence[float]]) -> None:
        ours = summarise(values.get(OURS, ()))
        if ours is None:
            return
        for engine, samples in values.items():
            theirs = summarise(samples)
            if engine not in (OURS, BASELINE, LIMIT) and theirs is not None and theirs.median < ours.median:
                found.append(f"{what}: {engine} {theirs.median:.4g}, ckptengine {ours.median:.4g}")

    figures = figures_by_engine(samples_of(document, "stall"))
    for every in sorted({block["every"] for runs in figures.values() for run in runs for block in run["blocks"]}):
        mine = stall_samples(figures, every)
        for key, what in (("blocked_s", "blocked"), ("stolen_s", "stolen"), ("durable_s", "durable after")):
            compare(f"stall, every {every}, {what} (s)", {engine: one[key] for engine, one in mine.items()})
    figures = figures_by_engine(samples_of(document, "durable"))
    compare("durable after (s)", {e: [save["durable_s"] for run in runs for save in run["saves"]]
                                  for e, runs in figures.items()})  # fmt: skip
    figures = figures_by_engine(samples_of(document, "memory"))
    compare("extra memory (bytes)", {e: [run["extra_bytes"] for run in runs] for e, runs in figures.items()})
    figures = figures_by_engine(samples_of(document, "restore"))
    for kind in ("cold", "warm"):
        compare(f"restore, {kind} (s)", {e: [one[kind]["seconds"] for run in runs for one in run["restores"]]
                                         for e, runs in figures.items()})  # fmt: skip
    figures = figures_by_engine(samples_of(document, "many-small"))
    compare("many-small, call (s)", {e: [save["call_s"] for run in runs for save in run["saves"]]
                                     for e, runs in figures.items()})  # fmt: skip
    figures = figures_by_engine(samples_of(document, "reshard"))
    compare("reshard (s)", {e: [s for run in runs for s in run["restores_s"]] for e, runs in figures.items()})
    return found


def section(name: str, document: Mapping[str, Any]) -> str:
    """One run: the machine, its tables, its picture, and where a rival is better."""
    parts = [f"## {name}\n", "```\n" + describe_machine(document) + "\n```\n"]
    if samples_of(document, "stall"):
        parts.append(f"![stolen time and one save of each engine](pictures/{name}.png)\n")
    parts += [table.markdown() for table in tables(document)]
    better = rivals_that_are_better(document)
    parts.append("**Where a rival's median is better than ours**\n")
    parts.append("\n".join(f"- {line}" for line in better) + "\n" if better else "In nothing that this run measured.\n")
    engines = configurations(document)
    lines = []
    for engine, known in engines.items():
        versions = ", ".join(f"{package} {version}" for package, version in known["versions"].items())
        lines.append(f"- `{engine}`{f' ({versions})' if versions else ''}: {known['configuration']}")
    if lines:
        parts += ["**How each engine was configured**\n", "\n".join(lines) + "\n"]
    return "\n".join(parts)


def curve_section(name: str, sweep: Mapping[str, Any]) -> str:
    """One scaling curve."""
    return "\n".join([f"## {name}\n", f"![scaling curve](pictures/{name}.png)\n", curves.table(sweep).markdown()])


def page(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The whole page."""
    method = (HERE / "method.md").read_text()
    parts = [method]
    if not found:
        parts.append("## Results\n\nNone yet: `bench/results/` is empty.\n")
    for name, document in found:
        parts.append(curve_section(name, document) if "sweep" in document else section(name, document))
    return "\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Write the page and its pictures, or check it."""
    found = documents(RESULTS)
    text = page(found)
    if "--check" in argv:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    pictures = DOCS / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, document in found:
        if "sweep" in document:
            curves.draw(document, pictures / f"{name}.png")
        elif samples_of(document, "stall"):
            draw(document, pictures / f"{name}.png")
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
