"""One table for every workload, from a result document.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .document import Document, configurations, figures_by_engine, samples_of, troubles
from .figures import limits_from_memory, stall_cuts, stall_processes, step_noise_s
from .names import BASELINE, LIMIT, REFERENCE
from .statistics import Summary, flat, noise_warnings, ratio, summarise
from .table import Table, percent, size, spread, times, verdict

Figures = Mapping[str, list[dict[str, Any]]]


def tables(document: Document) -> list[Table]:
    """Every table of the document, in the order of its workloads."""
    found: list[Table] = []
    for workload in document["options"]["workloads"]:
        samples = samples_of(document, workload)
        made = SUMMARIES[workload](document, samples)
        if samples and all(sample["result"]["status"] != "ok" for sample in samples):
            made = [Table(title=f"{workload}: nothing was measured", columns=("engine",), rows=())]
        for table in made:
            notes = [*table.notes, *troubles(samples)]
            found.append(Table(title=table.title, columns=table.columns, rows=table.rows, notes=notes))
    return found


def _by_median(rows: Mapping[str, Summary | None]) -> list[str]:
    return sorted(rows, key=lambda name: float("inf") if (found := rows[name]) is None else found.median)


def _durability(document: Document, engine: str) -> str:
    known = configurations(document).get(engine)
    if engine == BASELINE or known is None:
        return "-"
    return "own" if known["durable_by_itself"] else "fsync added"


def stall(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each number of compute threads and each interval."""
    return [_stall_table(document, runs_of, threads, every) for threads, every, runs_of in stall_cuts(document)]


def _stall_table(document: Document, figures: Figures, threads: int, every: int) -> Table:
    per_engine = stall_processes(figures, every)
    summaries = {
        name: {key: summarise(flat(values)) for key, values in mine.items()} for name, mine in per_engine.items()
    }
    reference = summaries.get(REFERENCE, {})
    limit = summaries.get(LIMIT, {})
    rows = []
    for engine in _by_median({name: mine["stolen_s"] for name, mine in summaries.items()}):
        mine = summaries[engine]
        checks = [check for run in figures[engine] for block in run["blocks"] if block["every"] == every
                  for check in block["checks"]]  # fmt: skip
        rows.append(
            (
                engine,
                spread(mine["blocked_s"], 1e3),
                spread(mine["slower_s"], 1e3),
                spread(mine["stolen_s"], 1e3),
                times(ratio(mine["stolen_s"], reference.get("stolen_s"))),
                times(ratio(mine["blocked_s"], reference.get("blocked_s"))),
                spread(mine["durable_s"]),
                times(ratio(mine["durable_s"], limit.get("durable_s"))),
                times(_median(mine["ratio"])),
                _durability(document, engine),
                verdict(checks),
            )
        )
    some = next(iter(figures.values()))[0] if figures else {"state_bytes": 0, "tensors": 0}
    plain = [step for runs in figures.values() for run in runs for step in run["plain_steps_s"]]
    noise = step_noise_s(figures)
    stolen_samples = {name: mine["stolen_s"] for name, mine in per_engine.items() if name not in (BASELINE, LIMIT)}
    step = summarise(plain)
    return Table(
        title=(
            f"stall: {size(some['state_bytes'])} in {some['tensors']} tensors, a save every {every} step(s), "
            f"{threads} compute thread(s), plain step {spread(step, 1e3)} ms"
        ),
        columns=(
            "engine", "blocked ms", "slower ms", "stolen ms", "stolen/dcp", "blocked/dcp",
            "durable after s", "durable/limit", "end to end/plain", "durability", "bits",
        ),
        rows=rows,
        notes=[f"dcp is {REFERENCE}", *noise_warnings("stolen", stolen_samples, noise, noise)],
    )  # fmt: skip


def _median(summary: Summary | None) -> float | None:
    return None if summary is None else summary.median


def durable(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Time and rate to durable, with the limit of the same process beside it."""
    figures = figures_by_engine(samples)
    summaries: dict[str, Summary | None] = {}
    rows: dict[str, tuple[str, ...]] = {}
    reference = summarise(save["durable_s"] for run in figures.get(REFERENCE, ()) for save in run["saves"])
    for engine, runs in figures.items():
        if engine == BASELINE:
            continue
        saves = [save for run in runs for save in run["saves"]]
        state_bytes = runs[0]["state_bytes"]
        mine = summaries[engine] = summarise(save["durable_s"] for save in saves)
        limit = summarise(save["limit_s"] for save in saves)
        rows[engine] = (
            engine,
            spread(summarise(save["call_s"] for save in saves), 1e3),
            spread(mine),
            spread(summarise(state_bytes / save["durable_s"] / 1e9 for save in saves)),
            percent(ratio(limit, mine)),
            percent(ratio(summarise(limits_from_memory(saves)), mine)),
            times(ratio(mine, reference)),
            spread(summarise(run["first_save"]["durable_s"] for run in runs)),
            size(saves[0]["bytes_on_disk"]),
            str(saves[0]["files"]),
            _durability(document, engine),
            verdict([save["check"] for save in saves]),
        )
    state_bytes = next(iter(figures.values()))[0]["state_bytes"] if figures else 0
    return [
        Table(
            title=f"durable: {size(state_bytes)}, nothing else running",
            columns=("engine", "call ms", "durable after s", "GB/s", "of raw pwrite", "of that from memory",
                     f"/{REFERENCE}", "first save s", "on disk", "files", "durability", "bits"),
            rows=[rows[engine] for engine in _by_median(summaries)],
        )
    ]  # fmt: skip


def many_small(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Cost per tensor."""
    figures = figures_by_engine(samples)
    summaries: dict[str, Summary | None] = {}
    rows: dict[str, tuple[str, ...]] = {}
    for engine, runs in figures.items():
        if engine in (BASELINE, LIMIT):
            continue
        saves = [save for run in runs for save in run["saves"]]
        summaries[engine] = summarise(save["call_s"] for save in saves)
        rows[engine] = (
            engine,
            spread(summarise(run["first_save"]["call_s"] for run in runs), 1e3),
            spread(summaries[engine], 1e3),
            spread(summarise(save["durable_s"] for save in saves)),
            spread(summarise(run["restore_s"] for run in runs)),
            size(saves[0]["bytes_on_disk"]),
            str(saves[0]["files"]),
            verdict([save["check"] for save in saves]),
        )
    tensors = next(iter(figures.values()))[0]["tensors"] if figures else 0
    return [
        Table(
            title=f"many-small: {tensors} tensors of 256 bytes",
            columns=("engine", "first call ms", "later calls ms", "durable after s", "restore s", "on disk", "files",
                     "bits"),
            rows=[rows[engine] for engine in _by_median(summaries)],
        )
    ]  # fmt: skip


def memory(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Extra host memory."""
    figures = figures_by_engine(samples)
    extra = {name: summarise(run["extra_bytes"] for run in runs) for name, runs in figures.items()}
    reference = extra.get(REFERENCE)
    rows = []
    for engine in _by_median(extra):
        runs, mine = figures[engine], extra[engine]
        assert mine is not None
        rows.append(
            (
                engine,
                size(mine.median),
                times(mine.median / runs[0]["state_bytes"]),
                times(ratio(mine, reference)),
                size(runs[0]["baseline_bytes"]),
            )
        )
    state_bytes = next(iter(figures.values()))[0]["state_bytes"] if figures else 0
    return [
        Table(
            title=f"memory: {size(state_bytes)} of state; anonymous and shared memory of all processes (PSS)",
            columns=("engine", "extra at peak", "extra/state", f"extra/{REFERENCE}", "training alone"),
            rows=rows,
            notes=["extra includes setting the engine up and its own processes; file pages are in the raw samples"],
        )
    ]


def restore(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Cold and warm restores."""
    figures = figures_by_engine(samples)
    colds: dict[str, Summary | None] = {}
    rows: dict[str, tuple[str, ...]] = {}
    reference = summarise(one["cold"]["seconds"] for run in figures.get(REFERENCE, ()) for one in run["restores"])
    for engine, runs in figures.items():
        if engine == BASELINE:
            continue
        restores = [one for run in runs for one in run["restores"]]
        state_bytes = runs[0]["state_bytes"]
        colds[engine] = summarise(one["cold"]["seconds"] for one in restores)
        limit = summarise(one["limit_s"] for one in restores)
        rows[engine] = (
            engine,
            spread(colds[engine]),
            spread(summarise(state_bytes / one["cold"]["seconds"] / 1e9 for one in restores)),
            percent(ratio(limit, colds[engine])),
            times(ratio(colds[engine], reference)),
            spread(summarise(one["warm"]["seconds"] for one in restores)),
            verdict([one[kind]["check"] for one in restores for kind in ("cold", "warm")]),
        )
    state_bytes = next(iter(figures.values()))[0]["state_bytes"] if figures else 0
    return [
        Table(
            title=f"restore: {size(state_bytes)} into touched tensors",
            columns=("engine", "cold s", "cold GB/s", "of raw direct read", f"/{REFERENCE}", "warm s", "bits"),
            rows=[rows[engine] for engine in _by_median(colds)],
        )
    ]


def disk(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The machine's limits."""
    rates: dict[str, list[tuple[float, float]]] = {}
    size_bytes = 0
    for sample in samples:
        if sample["result"]["status"] != "ok":
            continue
        figures = sample["result"]["figures"]
        size_bytes = figures["size_bytes"]
        for measured in figures["rounds"]:
            for name, bytes_per_s, seconds in measured:
                rates.setdefault(name, []).append((bytes_per_s, seconds))
    rows = [
        (name, spread(summarise(v[0] / 1e9 for v in values)), spread(summarise(v[1] for v in values), 1e3))
        for name, values in rates.items()
    ]
    return [Table(title=f"disk: limits with {size(size_bytes)}", columns=("what", "GB/s", "ms"), rows=rows)]


def reshard(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Saved on some ranks, restored on others."""
    figures = figures_by_engine(samples)
    summaries: dict[str, Summary | None] = {}
    rows: dict[str, tuple[str, ...]] = {}
    reference = summarise(seconds for run in figures.get("dcp-save", ()) for seconds in run["restores_s"])
    for engine, runs in figures.items():
        mine = summaries[engine] = summarise(seconds for run in runs for seconds in run["restores_s"])
        rows[engine] = (
            engine,
            spread(mine),
            times(ratio(mine, reference)),
            spread(summarise(run["save_s"] for run in runs)),
            times(runs[0]["read_bytes"] / runs[0]["state_bytes"]),
            size(runs[0]["bytes_on_disk"]),
            str(runs[0]["files"]),
            verdict([run["check"] for run in runs]),
        )
    some: dict[str, Any] = next(iter(figures.values()))[0] if figures else {"state_bytes": 0, "ranks": [0, 0]}
    ranks = some["ranks"]
    return [
        Table(
            title=f"reshard: {size(some['state_bytes'])} saved on {ranks[0]} ranks, restored on {ranks[1]}, cold",
            columns=("engine", "restore s", "/dcp-save", "save s", "read/needed", "on disk", "files", "bits"),
            rows=[rows[engine] for engine in _by_median(summaries)],
            notes=["read / needed counts read calls; what is read through a memory map is not seen"],
        )
    ]


def metadata(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Metadata and planning at scale."""
    figures = figures_by_engine(samples)
    rows = []
    for engine, runs in figures.items():
        rows.append(
            (
                engine,
                size(runs[0]["central_bytes"]),
                size(runs[0]["metadata_bytes"]),
                size(runs[0]["read_by_one_rank_bytes"]),
                spread(summarise(run["plan_save_s"] for run in runs)),
                spread(summarise(run["plan_restore_s"] for run in runs)),
                size(runs[0]["peak_bytes"]),
            )
        )
    some: dict[str, Any] = next(iter(figures.values()))[0] if figures else {"ranks": 0, "tensors": 0}
    return [
        Table(
            title=f"metadata: {some['ranks']} ranks x {some['tensors']} fully sharded tensors, simulated",
            columns=("engine", "manifest", "with all indexes", "read by one rank", "plan of the save s",
                     "plan of one rank's restore s", "peak memory"),
            rows=rows,
        )
    ]  # fmt: skip


def convert(document: Document, samples: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Conversions, with the direct copy of the source as the limit."""
    figures = figures_by_engine(samples)
    names = list(dict.fromkeys(name for runs in figures.values() for run in runs for name in run["conversions"]))
    rows = []
    reasons: list[str] = []
    for name in names:
        found: dict[str, list[dict[str, Any]]] = {}
        for engine, runs in figures.items():
            found[engine] = [one for run in runs for one in run["conversions"].get(name, ())]
        times_of = {
            engine: summarise(one["seconds"] for one in ones if "seconds" in one) for engine, ones in found.items()
        }
        for engine, ones in found.items():
            if not ones:
                continue
            rows.append((name, engine, *_conversion(ones, times_of[engine])))
            if times_of[engine] is None:
                reasons.append(f"{name}, {engine}: " + ": ".join(next(iter(ones[0].items()))))
    return [
        Table(
            title="convert: cold, until durable",
            columns=("conversion", "engine", "s", "of direct copy", "read + written / source", "extra memory",
                     "on disk", "files", "bits"),
            rows=rows,
            notes=[*reasons, "each conversion follows a direct copy of the same source in the same process"],
        )
    ]  # fmt: skip


def _conversion(ones: list[dict[str, Any]], mine: Summary | None) -> tuple[str, ...]:
    if mine is None:
        return ("-", "-", "-", "-", "-", "-", next(iter(ones[0])))
    done = ones[0]
    return (
        spread(mine),
        percent(ratio(summarise(one["copy_s"] for one in ones if "copy_s" in one), mine)),
        times((done["read_bytes"] + done["written_bytes"]) / done["source_bytes"]),
        size(max(one["extra_bytes"] for one in ones)),
        size(done["bytes_on_disk"]),
        str(done["files"]),
        verdict([one["check"] for one in ones]),
    )


SUMMARIES: dict[str, Callable[[Document, Sequence[Mapping[str, Any]]], list[Table]]] = {
    "disk": disk,
    "stall": stall,
    "durable": durable,
    "memory": memory,
    "restore": restore,
    "many-small": many_small,
    "reshard": reshard,
    "metadata": metadata,
    "convert": convert,
}
"""The table of each workload."""
