"""Scaling curves: what is varied, what is drawn, and what a sweep leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import curves, sweep
from bench.options import Options

MACHINE = {"processor": "P", "cores": 2, "virtual": True, "memory_bytes": 1 << 30, "kernel": "6", "python": "3",
           "file_system": {"type": "ext4", "device": "d"}, "load_1min": 0.0}  # fmt: skip


def run_of(options: Options, result: Path) -> dict[str, Any]:
    """As a run would: a journal, and a document in which everything takes a second for each GiB."""
    result.with_name(result.name + ".journal").write_text("{}\n")
    assert options.state_bytes is not None
    seconds = options.state_bytes / (1 << 30)
    figures = {"saves": [{"durable_s": seconds, "limit_s": seconds / 2}] * options.saves if options.saves else []}
    described = {"workloads": list(options.workloads), "device": "cpu", "size": "small", "every": [1]}
    return {
        "schema": 1, "date": "2026-01-01", "machine": MACHINE, "options": described, "seconds": 1.0,
        "samples": [{"job": {"workload": "durable", "engine": engine}, "result": {"status": "ok", "figures": figures}}
                    for engine in options.engines or ()],
    }  # fmt: skip


def test_a_curve_over_the_size_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "run", run_of)
    target = tmp_path / "curve.json"
    assert sweep.main(["state", "--values", "512M,2G", "--json", str(target)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["curve.json"], "the journals of the points are gone"
    document = json.loads(target.read_text())
    drawn = curves.curve(document)
    assert set(drawn) == {*sweep.ENGINES["state"], "raw pwrite"}
    assert [drawn["ckptengine"][value].median for value in (1 << 29, 1 << 31)] == [0.5, 2.0]
    assert drawn["raw pwrite"][1 << 31].median == 1.0
    assert "| ckptengine | 0.500 | 2.00 |" in curves.table(document).markdown()
    curves.draw(document, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("kind", "workload", "field", "value"),
    [("state", "durable", "state_bytes", 7 << 20), ("tensors", "many-small", "tensors", 7),
     ("ranks", "reshard", "ranks", (7, 7)), ("simulated", "metadata", "simulated", (7, 1_000)),
     ("every", "stall", "every", (7,))],
)  # fmt: skip
def test_what_each_curve_varies(kind: str, workload: str, field: str, value: Any) -> None:
    ((point, options),) = sweep.points(kind, Options(), [7 << 20 if kind == "state" else 7])
    assert point == (7 << 20 if kind == "state" else 7)
    assert options.workloads == (workload,)
    assert getattr(options, field) == value
    assert len(sweep.points(kind, Options(), None)) >= 3


def test_a_sweep_that_cannot_be_made_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["state", "--values", "5", "--json", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
