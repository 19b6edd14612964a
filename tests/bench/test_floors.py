"""Floors, rankings and who is better, from traces of which the right answers are known."""

from __future__ import annotations

from typing import Any

import pytest

from bench import floors, report
from bench.figures import ranked, stall_processes, step_noise_s
from bench.summaries import tables

PLAIN_S = 1.0


def stall_run(call_s: float, fence_s: float, slower_s: float, durable_s: float, plain_s: float = PLAIN_S) -> Any:
    """A block of four steps with saves after the first and the third; the step after each is held up and slower."""
    steps, saves, now = [], [], 0.0
    for number in range(4):
        held = fence_s if number in (1, 3) else 0.0
        length = plain_s + (slower_s + held if number in (1, 3) else 0.0)
        steps.append([now, now + length, held])
        now += length
        if number in (0, 2):
            saves.append({"step": number, "start_s": now, "returned_s": now + call_s, "fence_s": fence_s,
                          "durable_s": now + durable_s})  # fmt: skip
            now += call_s
    trace = {"steps": steps, "saves": saves, "end_s": now, "drained_s": now}
    return {
        "state_bytes": 1000, "tensors": 3, "plain_steps_s": [plain_s] * 3, "plain_step_s": plain_s,
        "blocks": [{"every": 2, "trace": trace, "checks": ["ok", "ok"], "repeatable": True}],
    }  # fmt: skip


def sample(workload: str, engine: str, figures: Any, threads: int = 1) -> dict[str, Any]:
    return {"job": {"workload": workload, "engine": engine, "threads": threads},
            "result": {"status": "ok", "figures": figures}}  # fmt: skip


def document(*samples: dict[str, Any], cores: int = 2, size: str = "real") -> dict[str, Any]:
    machine = {"processor": "P", "cores": cores, "virtual": True, "memory_bytes": 1 << 30, "kernel": "6", "python": "3",
               "file_system": {"type": "ext4", "device": "d"}, "load_1min": 0.0}  # fmt: skip
    workloads = list(dict.fromkeys(one["job"]["workload"] for one in samples))
    return {"schema": 1, "date": "2026-01-01", "machine": machine, "seconds": 60.0,
            "options": {"size": size, "device": "cpu", "workloads": workloads}, "samples": list(samples)}  # fmt: skip


def stall_document(own_slower_s: float, threads: int) -> dict[str, Any]:
    return document(
        sample("stall", "none", stall_run(0.0, 0.0, 0.0, 0.0), threads),
        sample("stall", "pwrite", stall_run(0.5, 0.0, 0.0, 0.5), threads),
        sample("stall", "ckptengine", stall_run(0.001, 0.002, own_slower_s, 0.6), threads),
        sample("stall", "dcp-async", stall_run(0.25, 0.25, 0.5, 1.25), threads),
        sample("stall", "safetensors", stall_run(0.4, 0.0, 0.0, 0.45), threads),
    )


def by_name(found: list[floors.Floor]) -> dict[str, floors.Floor]:
    return {floor.what.partition(",")[0] + (" rel" if "dcp" in floor.allowed else ""): floor for floor in found}


def test_stolen_time_of_a_known_trace() -> None:
    mine = stall_processes({"x": [stall_run(0.25, 0.5, 0.125, 0.75)]}, 2)["x"]
    assert mine["blocked_s"] == [[0.75, 0.75]]
    assert mine["slower_s"] == [[0.125, 0.125]]
    assert mine["stolen_s"] == [[0.875, 0.875]]
    assert mine["durable_s"] == [[0.75, 0.75]]
    assert mine["ratio"] == [[(4 * 1.0 + 2 * 0.625 + 2 * 0.25) / 4]]


def test_a_quicker_loop_under_load_does_not_hide_what_was_stolen() -> None:
    assert stall_processes({"x": [stall_run(0.0, 0.0, 0.25, 0.5, plain_s=2.0)]}, 2)["x"]["stolen_s"] == [[0.25, 0.25]]
    run = {**stall_run(0, 0, 0, 0), "plain_steps_s": [0.75, 1.0, 1.5]}
    assert step_noise_s({"x": [run]}) == 0.25


@pytest.mark.parametrize(("own_slower_s", "threads", "met"), [(0.01, 1, True), (0.1, 1, False), (0.1, 2, True)])
def test_what_may_be_stolen_depends_on_a_spare_core(own_slower_s: float, threads: int, met: bool) -> None:
    (floor,) = (f for f in floors.floors(stall_document(own_slower_s, threads)) if f.what.startswith("stolen"))
    assert floor.met is met
    assert "safetensors 400 ms" in floor.allowed, "the best rival, not the slowest"


def test_blocked_and_durable_floors_of_a_known_trace() -> None:
    found = by_name(floors.floors(stall_document(0.01, 1)))
    assert found["blocked"].measured == "3.00 ms"
    assert found["blocked"].met
    assert found["blocked rel"].measured == "0.006x dcp-async"
    assert found["blocked rel"].met
    assert found["durable after rel"].measured == "0.480x dcp-async"


def test_a_disk_slower_than_a_step_has_a_floor_of_its_own() -> None:
    slow = document(
        sample("stall", "pwrite", stall_run(3.0, 0.0, 0.0, 3.0)),
        sample("stall", "ckptengine", stall_run(0.0, 2.25, 0.0, 3.1)),
        sample("stall", "torch-save", stall_run(2.0, 0.0, 0.0, 2.0)),
    )
    found = [floor for floor in floors.floors(slow) if floor.what.startswith("blocked")]
    assert [floor.met for floor in found] == [False, False]
    assert found[0].allowed == "<= 2200 ms"
    assert "torch-save" in found[1].measured


def durable_run(seconds: float, limit_s: float, from_memory_s: float | None = None) -> dict[str, Any]:
    save = {"call_s": 0.1, "durable_s": seconds, "limit_s": limit_s}
    return {"saves": [save if from_memory_s is None else {**save, "limit_from_memory_s": from_memory_s}] * 4}


def restore_run(cold_s: float, limit_s: float) -> dict[str, Any]:
    one = {"limit_s": limit_s, "cold": {"seconds": cold_s}, "warm": {"seconds": cold_s / 2}}
    return {"restores": [one] * 3}


def test_rates_are_those_of_the_limit_of_the_same_process() -> None:
    found = floors.floors(document(
        sample("durable", "ckptengine", durable_run(1.0, 0.8)), sample("durable", "dcp-async", durable_run(2.5, 0.1)),
        sample("restore", "ckptengine", restore_run(1.0, 0.9)), sample("restore", "safetensors", restore_run(0.5, 0.9)),
        sample("memory", "ckptengine", {"extra_bytes": 50}), sample("memory", "dcp-async", {"extra_bytes": 400}),
    ))  # fmt: skip
    assert [(floor.measured, floor.met) for floor in found] == [
        ("0.400x dcp-async", True), ("80 %", False), ("0.125x, 50.0 B", False), ("90 %", True), ("1.00 s", False)
    ]  # fmt: skip
    both = floors.floors(document(sample("durable", "ckptengine", durable_run(1.0, 0.8, 0.9))))
    assert [(floor.measured, floor.met) for floor in both] == [("80 %", False), ("90 %", True)]
    table = floors.table(document(sample("durable", "ckptengine", durable_run(1.0, 0.8))))
    assert table is not None
    assert table.notes == ["0 of 1 met, 1 missed"]
    assert table.rows[0][-1] == "MISSED"
    assert floors.table(document()) is None


@pytest.mark.parametrize(("tensors", "met"), [(100_000, [True, False]), (2_000, [None, False])])
def test_few_tensors_can_miss_the_floor_of_many_but_not_meet_it(tensors: int, met: list[bool | None]) -> None:
    run = {"tensors": tensors, "first_save": {"call_s": 0.5}, "saves": [{"call_s": 0.2}], "restore_s": 1.0}
    assert [floor.met for floor in floors.floors(document(sample("many-small", "ckptengine", run)))] == met


def test_a_better_rival_is_named_and_told_from_noise() -> None:
    beyond, within = report.rivals_that_are_better(document(
        sample("durable", "ckptengine", durable_run(1.0, 0.8)), sample("durable", "fast", durable_run(0.5, 0.8)),
        sample("durable", "close", durable_run(0.97, 0.8)), sample("durable", "slow", durable_run(3.0, 0.8)),
        sample("durable", "pwrite", durable_run(0.1, 0.1)),
    ))  # fmt: skip
    assert beyond == ["durable: durable after: fast 500 ms, ckptengine 1.00 s, 2.00 times as much"]
    assert within == ["durable: durable after: close 970 ms, ckptengine 1.00 s, 1.03 times as much"]


def test_runs_with_the_same_options_are_held_beside_each_other() -> None:
    def run(own_s: float) -> dict[str, Any]:
        return document(sample("durable", "ckptengine", durable_run(own_s, 0.8)),
                        sample("durable", "other", durable_run(1.0, 0.8)))  # fmt: skip

    agreed = report.agreements([("b", run(0.4)), ("a", run(0.5))])
    assert "`a` and `b` agree on all 2 rankings" in agreed
    swapped = report.agreements([("b", run(3.0)), ("a", run(0.5))])
    assert "contradict each other: durable: durable after: ckptengine and other change places" in swapped
    assert report.agreements([("b", {**run(3.0), "options": {"other": 1}}), ("a", run(0.5))]) == ""


def test_what_is_ranked_names_its_threads() -> None:
    both = stall_document(0.01, 1)
    both["samples"] += stall_document(0.01, 2)["samples"]
    names = [one.what for one in ranked(both)]
    assert sorted({name.partition(",")[2].partition(",")[0] for name in names}) == [" 1 thread(s)", " 2 thread(s)"]
    assert len(names) == 6


def test_a_workload_of_which_nothing_could_run_shows_the_reason() -> None:
    skipped = document(sample("stall", "none", {}))
    skipped["samples"][0]["result"] = {"status": "skipped", "reason": "no cuda device"}
    skipped["options"]["device"] = "cuda"
    (table,) = tables(skipped)
    assert table.notes == ["none: skipped: no cuda device"]
    assert "no cuda device" in report.section("run", skipped)
