"""The floors that ckptengine was built to, beside what a run measured; every word comes from the samples.  Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .document import Document, figures_by_engine, samples_of
from .figures import limits_from_memory, stall_cuts, stall_samples, step_noise_s
from .names import BASELINE, LIMIT, OURS, REFERENCE
from .table import Table, number, size

WIDE_RESTORES = ("safetensors", "torch-save")
"""Engines than which a cold restore must never be slower."""
MANY_TENSORS = 100_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """One floor and one figure."""

    what: str
    allowed: str
    measured: str
    met: bool | None
    """None: this run cannot say."""

    @property
    def verdict(self) -> str:
        """In one word."""
        return {True: "met", False: "MISSED", None: "not judged"}[self.met]


def floors(document: Document) -> list[Floor]:
    """Every floor that the run measured something for."""
    return [*_stall(document), *_durable(document), *_memory(document), *_restore(document), *_many_small(document)]


def table(document: Document) -> Table | None:
    """The floors as a table; none where nothing was measured that has one."""
    found = floors(document)
    if not found:
        return None
    missed = sum(floor.met is False for floor in found)
    judged = sum(floor.met is not None for floor in found)
    notes = [f"{judged - missed} of {judged} met" + (f", {missed} missed" if missed else "")]
    if document["options"]["size"] != "real":
        notes.append("the floors are set for the state of 1.5 GB (size real); at this size they are an indication")
    return Table(
        title="ckptengine's floors",
        columns=("figure", "floor", "measured", "verdict"),
        rows=[(floor.what, floor.allowed, floor.measured, floor.verdict) for floor in found],
        notes=notes,
    )


def _at_most(what: str, value: float, allowed: float, unit: Callable[[float], str], against: str = "") -> Floor:
    return Floor(
        what=what, allowed=f"<= {unit(allowed)}{against}", measured=unit(value) + against, met=value <= allowed
    )


def _ms(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def _s(seconds: float) -> str:
    return f"{number(seconds)} s"


def _x(value: float) -> str:
    return f"{number(value)}x"


def _percent(value: float) -> str:
    return f"{value * 100:.0f} %"


def _stall(document: Document) -> Iterator[Floor]:
    cores = document["machine"]["cores"]
    for threads, every, runs_of in stall_cuts(document):
        samples = stall_samples(runs_of, every)
        medians = {
            engine: {key: statistics.median(values) for key, values in mine.items() if values}
            for engine, mine in samples.items()
        }
        ours = medians.get(OURS, {})
        if "stolen_s" not in ours:
            continue
        where = f", every {every} step(s), {threads} thread(s)"
        step_s = statistics.median(step for runs in runs_of.values() for run in runs for step in run["plain_steps_s"])
        yield from _blocked(where, medians, step_s)
        yield from _stolen(where, medians, step_noise_s(runs_of), spare=threads < cores)
        reference = medians.get(REFERENCE, {})
        if "durable_s" in reference:
            yield _at_most(
                f"durable after{where}", ours["durable_s"] / reference["durable_s"], 0.5, _x, f" {REFERENCE}"
            )
        if every == 1:
            disk_s = medians.get(LIMIT, {}).get("durable_s")
            without = medians.get(BASELINE, {}).get("ratio")
            if disk_s is not None and disk_s <= step_s and without is not None:
                yield _at_most(f"end to end{where}", ours["ratio"] / without, 1.05, _x, " no checkpoint")


def _blocked(where: str, medians: Mapping[str, Mapping[str, float]], step_s: float) -> Iterator[Floor]:
    """Which of the two floors holds depends on whether the disk takes the state within a step."""
    ours = medians[OURS]["blocked_s"]
    reference = medians.get(REFERENCE, {}).get("blocked_s")
    disk_s = medians.get(LIMIT, {}).get("durable_s")
    if disk_s is None or disk_s <= step_s:
        yield _at_most(f"blocked{where}", ours, 0.005, _ms)
        if reference is not None and reference > 0:
            yield _at_most(f"blocked{where}", ours / reference, 1 / 50, _x, f" {REFERENCE}")
        return
    yield _at_most(f"blocked, the disk being slower than a step{where}", ours, 1.1 * (disk_s - step_s), _ms)
    rivals = _rivals(medians, "blocked_s")
    if rivals:
        best = min(rivals, key=lambda name: rivals[name])
        yield _at_most(f"blocked, never more than the best rival's{where}", ours, rivals[best], _ms, f" ({best})")


def _rivals(medians: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    return {
        engine: mine[key] for engine, mine in medians.items() if engine not in (OURS, BASELINE, LIMIT) and key in mine
    }


def _stolen(where: str, medians: Mapping[str, Mapping[str, float]], noise_s: float, *, spare: bool) -> Iterator[Floor]:
    rivals = _rivals(medians, "stolen_s")
    if not rivals:
        return
    best = min(rivals, key=lambda name: rivals[name])
    part, ours = (1 / 5 if spare else 1 / 2), medians[OURS]["stolen_s"]
    core = "with a spare core" if spare else "without a spare core"
    below = f"; a plain step varies by {_ms(noise_s)}"
    yield Floor(
        what=f"stolen, {core}{where}",
        allowed=f"<= {part:g} x the best rival's, {best} {_ms(rivals[best])}",
        measured=_ms(ours) + below,
        met=ours <= part * rivals[best] if rivals[best] > noise_s else None,
    )


def _values(document: Document, workload: str, of: Callable[[dict[str, Any]], list[float]]) -> dict[str, float]:
    """The median over all samples of a workload, by engine."""
    found = {}
    for engine, runs in figures_by_engine(samples_of(document, workload)).items():
        values = [value for run in runs for value in of(run)]
        if values:
            found[engine] = statistics.median(values)
    return found


def _durable(document: Document) -> Iterator[Floor]:
    medians = _values(document, "durable", lambda run: [save["durable_s"] for save in run["saves"]])
    limits = _values(document, "durable", lambda run: [save["limit_s"] for save in run["saves"]])
    if OURS not in medians:
        return
    if REFERENCE in medians:
        part = medians[OURS] / medians[REFERENCE]
        yield _at_most("durable after, nothing else running", part, 0.5, _x, f" {REFERENCE}")
    yield _at_least("write rate", limits[OURS] / medians[OURS], "raw direct pwrite of one warm block, interleaved")
    from_memory = _values(document, "durable", lambda run: limits_from_memory(run["saves"]))
    if OURS in from_memory:
        of = "raw direct pwrite of as much memory as the state, interleaved"
        yield _at_least("write rate, from memory", from_memory[OURS] / medians[OURS], of)


def _at_least(what: str, part: float, of: str) -> Floor:
    return Floor(what=what, allowed=f">= 85 % of {of}", measured=_percent(part), met=part >= 0.85)


def _memory(document: Document) -> Iterator[Floor]:
    extra = _values(document, "memory", lambda run: [run["extra_bytes"]])
    if extra.get(REFERENCE, 0) > 0 and OURS in extra:
        yield Floor(
            what="extra memory at peak",
            allowed=f"<= 0.1x {REFERENCE}, {size(extra[REFERENCE])}",
            measured=f"{_x(extra[OURS] / extra[REFERENCE])}, {size(extra[OURS])}",
            met=extra[OURS] <= extra[REFERENCE] / 10,
        )


def _restore(document: Document) -> Iterator[Floor]:
    cold = _values(document, "restore", lambda run: [one["cold"]["seconds"] for one in run["restores"]])
    limits = _values(document, "restore", lambda run: [one["limit_s"] for one in run["restores"]])
    if OURS not in cold:
        return
    yield _at_least("cold restore rate", limits[OURS] / cold[OURS], "raw direct read, interleaved")
    for rival in WIDE_RESTORES:
        if rival in cold:
            yield _at_most(f"cold restore, never slower than {rival}", cold[OURS], cold[rival], _s)


def _many_small(document: Document) -> Iterator[Floor]:
    runs = figures_by_engine(samples_of(document, "many-small")).get(OURS, [])
    if not runs:
        return
    tensors = runs[0]["tensors"]
    first_s = statistics.median(run["first_save"]["call_s"] for run in runs)
    later_s = statistics.median(save["call_s"] for run in runs for save in run["saves"])
    for what, value, allowed in (("first", first_s, 1.0), ("later", later_s, 0.1)):
        floor = _at_most(f"registration of {tensors} tensors, {what} save", value, allowed, _ms)
        # Fewer tensors than the floor is set for can miss it, but not meet it.
        yield floor if tensors >= MANY_TENSORS or not floor.met else dataclasses.replace(floor, met=None)
