"""Writes docs/benchmarks.md, its pictures and the README's table from the JSON under bench/results/; no figure in them
is typed by hand.

``python -m bench.report [--check]``: with ``--check`` nothing is written, and the exit status is 1 where the page is
not what the results give.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import agree, curves, floors, short
from .document import configurations, describe_machine, figures_by_engine, samples_of
from .figures import ranked
from .names import BASELINE, LIMIT, OURS
from .plot import draw
from .statistics import LEAST_RELATIVE_NOISE, compare, flat, process_noise, ranking, summarise
from .summaries import tables
from .table import number, size

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PAGE = DOCS / "benchmarks.md"
README = HERE.parent / "README.md"
SHORT = "<!-- the results in short -->\n"
"""Where the table of `short` goes: on the page in place of this line, in the README between two such lines."""


def documents(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every result of this harness, newest first, by file name."""
    found = [(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"), reverse=True)]
    return [(name, one) for name, one in found if isinstance(one, dict) and ("sweep" in one or "samples" in one)]


def rivals_that_are_better(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Every figure in which a rival's median is better than ours: said plainly, found by this function.

    First those that are beyond the noise, then those that are within it.
    """
    beyond: list[str] = []
    within: list[str] = []
    for one in ranked(document):
        ours = summarise(flat(one.processes.get(OURS, ())))
        if ours is None:
            continue
        relative = max(LEAST_RELATIVE_NOISE, process_noise(one.processes))
        better = []
        for engine, processes in one.processes.items():
            theirs = summarise(flat(processes))
            if engine not in (OURS, BASELINE, LIMIT) and theirs is not None and theirs.median < ours.median:
                told = compare(processes, one.processes[OURS], one.resolution, relative) < 0
                better.append((theirs.median, engine, told))
        for median, engine, told in sorted(better):
            factor = f", {number(ours.median / median)} times as much" if median > 0 else ""
            line = (f"{one.what}: {engine} {quantity(median, one.unit)}, "
                    f"ckptengine {quantity(ours.median, one.unit)}{factor}")  # fmt: skip
            (beyond if told else within).append(line)
    return beyond, within


def quantity(value: float, unit: str) -> str:
    """A figure with its unit: seconds below one as milliseconds."""
    if unit == "bytes":
        return size(value)
    return f"{number(value * 1e3)} ms" if abs(value) < 1 else f"{number(value)} s"


def rankings(document: Mapping[str, Any]) -> list[str]:
    """One line per figure: engines from the best to the worst, those that the run cannot tell apart joined by "="."""
    lines = []
    for one in ranked(document):
        groups = ranking(one.processes, one.resolution)
        if sum(map(len, groups)) > 1:
            lines.append(f"{one.what}: " + " < ".join(" = ".join(group) for group in groups))
    return lines


def agreements(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What pairs of runs with the same options say of each other; empty where there is none."""
    lines = []
    runs = [(name, document) for name, document in found if "sweep" not in document]
    for (later, second), (earlier, first) in itertools.combinations(runs, 2):
        if first["options"] != second["options"]:
            continue
        mine, other = agree.orders(first), agree.orders(second)
        swaps = [f"{what}: {swap}" for what in mine for swap in agree.contradictions(mine[what], other.get(what, {}))]
        said = f"contradict each other: {'; '.join(swaps)}" if swaps else f"agree on all {len(mine)} rankings"
        lines.append(f"- `{earlier}` and `{later}` {said}.\n")
    return "## Runs beside each other\n\n" + "".join(lines) if lines else ""


def has_stall(document: Mapping[str, Any]) -> bool:
    """There is something to draw."""
    return bool(figures_by_engine(samples_of(document, "stall")))


def section(name: str, document: Mapping[str, Any]) -> str:
    """One run: the machine, its tables, its picture, and where a rival is better."""
    parts = [f"## {name}\n", "```\n" + describe_machine(document) + "\n```\n"]
    if has_stall(document):
        parts.append(f"![stolen time and one save of each engine](pictures/{name}.png)\n")
    parts += [table.markdown() for table in tables(document)]
    judged = floors.table(document)
    if judged is not None:
        parts.append(judged.markdown())
    beyond, within = rivals_that_are_better(document)
    for title, lines in (
        ("Where a rival is better than ours, beyond the noise", beyond),
        ("Where a rival's median is better than ours, within the noise", within),
        ("Rankings, best first; = is not told apart", rankings(document)),
    ):
        parts.append(f"**{title}**\n")
        parts.append("\n".join(f"- {line}" for line in lines) + "\n" if lines else "In nothing that was measured.\n")
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
    parts = [(HERE / "method.md").read_text().replace(SHORT, in_short(found))]
    if not found:
        parts.append("## Results\n\nNone yet: `bench/results/` is empty.\n")
    for name, document in found:
        parts.append(curve_section(name, document) if "sweep" in document else section(name, document))
    beside = agreements(found)
    if beside:
        parts.append(beside)
    return "\n".join(parts)


def in_short(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The results in one table; empty where there is none."""
    table = short.table(found)
    return "" if table is None else table.markdown()


def readme(text: str, found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The README with its table from the results."""
    before, mark, rest = text.partition(SHORT)
    _, end, after = rest.partition(SHORT)
    return f"{before}{mark}{in_short(found)}{end}{after}" if end else text


def main(argv: Sequence[str]) -> int:
    """Write the page, its pictures and the README's table, or check them."""
    found = documents(RESULTS)
    written = {PAGE: page(found), README: readme(README.read_text(), found)}
    if "--check" in argv:
        return 0 if all(path.exists() and path.read_text() == text for path, text in written.items()) else 1
    pictures = DOCS / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, document in found:
        if "sweep" in document:
            curves.draw(document, pictures / f"{name}.png")
        elif has_stall(document):
            draw(document, pictures / f"{name}.png")
    for path, text in written.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
