"""What is said of saves while they run: totals, Prometheus, scalars, structured log lines."""

from __future__ import annotations

import json
import logging
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce
from ckptengine.observe.logs import JsonLines
from ckptengine.observe.scalars import write_scalars

from .jobs import run_steps, state_of


def train(checkpointer: ce.Checkpointer, state: dict[str, Any], root: Path) -> None:
    """Four saves, of which the root wants two; then one that fails, as the root is gone."""
    run_steps(checkpointer, state, range(1, 5))
    checkpointer.wait()
    root.rename(root.with_name("away"))
    root.write_bytes(b"")
    assert checkpointer.save(5).exception(20) is not None


def job(tmp_path: Path) -> tuple[ce.Checkpointer, dict[str, Any]]:
    state = state_of(0)
    tiers = [ce.Tier(tmp_path / "disk", interval=ce.Every(steps=1))]
    tolerate = ce.Tolerate(retries=0)
    every = ce.Every(steps=2)
    return ce.Checkpointer(state, tmp_path / "root", tiers=tiers, interval=every, on_failure=tolerate), state


def test_status(tmp_path: Path) -> None:
    checkpointer, state = job(tmp_path)
    assert checkpointer.status().durable_step is None
    train(checkpointer, state, tmp_path / "root")
    status = checkpointer.status()
    checkpointer.close()
    assert status.ended == {"committed": 2, "durable": 2, "failed": 1}
    assert (status.failures, status.in_flight, status.durable_step) == (1, 0, 4)
    assert status.last_error is not None
    assert status.last_error.startswith("storage-failed: ")
    assert status.written_bytes > 5 * state["big"].nbytes
    assert 0 < status.blocked_s < 60
    assert 0 <= status.durable_age_s < 60
    assert [(tier.label, tier.newest_step, tier.pending) for tier in status.tiers] == [
        (str(tmp_path / "disk"), 5, 0),
        (str(tmp_path / "root"), 4, 0),
    ]


def test_prometheus(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    from prometheus_client import CollectorRegistry, generate_latest

    from ckptengine.observe import prometheus

    checkpointer, state = job(tmp_path)
    registry = CollectorRegistry()
    prometheus.register(checkpointer, registry, {"rank": "0"})
    server, thread = prometheus.serve(checkpointer, 0)
    train(checkpointer, state, tmp_path / "root")
    text = generate_latest(registry).decode()
    assert 'ckptengine_saves_total{end="durable",rank="0"} 2.0' in text
    assert 'ckptengine_failures_total{rank="0"} 1.0' in text
    assert f'ckptengine_tier_step{{rank="0",tier="{tmp_path / "root"}"}} 4.0' in text
    assert 'ckptengine_in_flight{rank="0"} 0.0' in text
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
        assert b"ckptengine_durable_step 4.0" in answer.read()
    server.shutdown()
    server.server_close()
    thread.join()
    checkpointer.close()
    del checkpointer
    assert generate_latest(registry) == b"", "metrics do not keep a checkpointer alive"


def test_scalars(tmp_path: Path) -> None:
    written: dict[tuple[str, int], float] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written[tag, step] = value

    checkpointer, state = job(tmp_path)
    write_scalars(checkpointer, Writer())
    train(checkpointer, state, tmp_path / "root")
    checkpointer.close()
    assert [written["checkpoint/failed", step] for step in range(1, 6)] == [0, 0, 0, 0, 1]
    assert written["checkpoint/blocked_ms", 3] > 0
    assert written["checkpoint/written_bytes", 3] > state["big"].nbytes
    assert {step for tag, step in written if tag == "checkpoint/durable_s"} == {2, 4}


def test_an_observer_that_raises_spoils_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(handle: ce.SaveHandle) -> None:
        raise ValueError("observer")

    with ce.Checkpointer(state_of(1), tmp_path) as checkpointer:
        checkpointer.on_end(wrong)
        assert checkpointer.save(1).result(20) == 1
    assert "an observer of the save of step 1 raised" in caplog.text


def test_log_lines_are_json_with_fields(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(self.format(record)))

    handler = Keep()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("ckptengine")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        checkpointer, state = job(tmp_path)
        train(checkpointer, state, tmp_path / "root")
        checkpointer.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    arrived = [line for line in lines if line["message"].startswith("step 4 has arrived")]
    assert [(line["step"], line["target"], line["level"]) for line in arrived] == [
        (4, str(tmp_path / "root"), "info"),
    ]
    assert arrived[0]["sent_bytes"] > state["big"].nbytes
    assert any(line.get("error") == "storage-failed" and line.get("step") == 5 for line in lines)
