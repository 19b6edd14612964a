"""The figures by which a run ranks engines: for each of them the samples of every engine, process by process.  Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .document import Document, figures_by_engine, samples_of
from .statistics import Processes, flat
from .workloads.stall_figures import end_to_end, stolen

Runs = Mapping[str, list[dict[str, Any]]]
STALL_FIGURES = ("blocked_s", "slower_s", "stolen_s", "durable_s", "ratio")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One figure of one workload; less is better."""

    what: str
    unit: str
    processes: Mapping[str, Processes]
    resolution: float = 0.0
    """A difference below this is no difference."""


def stall_processes(runs_of: Runs, every: int) -> dict[str, dict[str, list[list[float]]]]:
    """Per engine and figure the samples at one interval, a list for each process (`ratio` is end to end)."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for engine, runs in runs_of.items():
        mine: dict[str, list[list[float]]] = {name: [] for name in STALL_FIGURES}
        for run in runs:
            one: dict[str, list[float]] = {name: [] for name in STALL_FIGURES}
            for block in run["blocks"]:
                if block["every"] != every:
                    continue
                for save in stolen(run["plain_step_s"], block):
                    for name, value in save.items():
                        one[name].append(value)
                one["ratio"].append(end_to_end(run["plain_step_s"], block))
            for name, values in one.items():
                mine[name].append(values)
        found[engine] = mine
    return found


def stall_samples(runs_of: Runs, every: int) -> dict[str, dict[str, list[float]]]:
    """The same with the samples of all processes in one list."""
    return {
        engine: {name: flat(values) for name, values in mine.items()}
        for engine, mine in stall_processes(runs_of, every).items()
    }


def stall_cuts(document: Document) -> list[tuple[int, int, Runs]]:
    """Compute threads, interval and runs of every stall table of the document."""
    samples = samples_of(document, "stall")
    found: list[tuple[int, int, Runs]] = []
    for threads in sorted({sample["job"]["threads"] for sample in samples}):
        runs_of = figures_by_engine(sample for sample in samples if sample["job"]["threads"] == threads)
        intervals = sorted({block["every"] for runs in runs_of.values() for run in runs for block in run["blocks"]})
        found += [(threads, every, runs_of) for every in intervals]
    return found


def step_noise_s(runs_of: Runs) -> float:
    """How far a plain step is from the median of its process, in the median over all of them: what no figure that is
    made of steps can be finer than."""
    away = [
        abs(step - run["plain_step_s"]) for runs in runs_of.values() for run in runs for step in run["plain_steps_s"]
    ]
    return statistics.median(away) if away else 0.0


def _saves(key: str) -> Callable[[dict[str, Any]], list[float]]:
    return lambda run: [save[key] for save in run["saves"]]


def _restores(kind: str) -> Callable[[dict[str, Any]], list[float]]:
    return lambda run: [one[kind]["seconds"] for one in run["restores"]]


OTHERS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], list[float]], float], ...] = (
    ("durable", "call", "s", _saves("call_s"), 0.001),
    ("durable", "durable after", "s", _saves("durable_s"), 0.005),
    ("memory", "extra memory", "bytes", lambda run: [run["extra_bytes"]], 4 << 20),
    ("restore", "cold", "s", _restores("cold"), 0.005),
    ("restore", "warm", "s", _restores("warm"), 0.005),
    ("reshard", "restore", "s", lambda run: list(run["restores_s"]), 0.005),
    ("many-small", "call", "s", _saves("call_s"), 0.001),
    ("many-small", "restore", "s", lambda run: [run["restore_s"]], 0.005),
    ("metadata", "metadata in all", "bytes", lambda run: [run["metadata_bytes"]], 0.0),
    ("metadata", "read by one rank", "bytes", lambda run: [run["read_by_one_rank_bytes"]], 0.0),
)
"""Workload, figure, unit, samples of one process, and the resolution: timers and file systems are no finer."""


def ranked(document: Document) -> list[Ranked]:
    """Everything that is ranked in a run, in the order of its workloads."""
    found = []
    for threads, every, runs_of in stall_cuts(document):
        mine = stall_processes(runs_of, every)
        noise = step_noise_s(runs_of)
        for key, what, resolution in (
            ("blocked_s", "blocked", 0.001), ("stolen_s", "stolen", noise), ("durable_s", "durable after", 0.005)
        ):  # fmt: skip
            values = {engine: one[key] for engine, one in mine.items()}
            title = f"stall, {threads} thread(s), every {every} step(s): {what}"
            found.append(Ranked(what=title, unit="s", processes=values, resolution=resolution))
    for workload, what, unit, samples, resolution in OTHERS:
        runs_of = figures_by_engine(samples_of(document, workload))
        if runs_of:
            values = {engine: [samples(run) for run in runs] for engine, runs in runs_of.items()}
            found.append(Ranked(what=f"{workload}: {what}", unit=unit, processes=values, resolution=resolution))
    return found + list(_conversions(document))


def _conversions(document: Document) -> Iterable[Ranked]:
    runs_of = figures_by_engine(samples_of(document, "convert"))
    for name in dict.fromkeys(name for runs in runs_of.values() for run in runs for name in run["conversions"]):
        values = {
            engine: [[one["seconds"] for one in run["conversions"].get(name, ()) if "seconds" in one] for run in runs]
            for engine, runs in runs_of.items()
        }
        yield Ranked(what=f"convert, {name}", unit="s", processes=values, resolution=0.005)


def limits_from_memory(saves: Iterable[Mapping[str, Any]]) -> list[float]:
    """Seconds that raw writes of as much memory as the state took; documents of before 2026-11-24 have none."""
    return [save["limit_from_memory_s"] for save in saves if "limit_from_memory_s" in save]
