"""A checkpointer's totals for Prometheus: ``register(checkpointer)``, or ``serve(checkpointer, port)``.

Nothing runs between scrapes: the numbers are read when somebody asks.  Needs the extra ``prometheus``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

_TIER = ["tier"]


class Observed(Protocol):
    """What is needed of `ckptengine.Checkpointer`."""

    def status(self) -> Any: ...


class CheckpointCollector(Collector):
    """Metrics of one checkpointer, which it does not keep alive; every name begins with ``ckptengine_``."""

    def __init__(self, checkpointer: Observed, labels: dict[str, str] | None = None) -> None:
        self._checkpointer = weakref.ref(checkpointer)
        self._labels = labels or {}

    def collect(self) -> Iterator[Metric]:
        """Read the totals; nothing once the checkpointer is gone."""
        checkpointer = self._checkpointer()
        if checkpointer is None:
            return
        status = checkpointer.status()
        names, values = list(self._labels), list(self._labels.values())
        saves = CounterMetricFamily("ckptengine_saves", "Saves by how they ended", labels=["end", *names])
        for end, count in status.ended.items():
            saves.add_metric([end, *values], count)
        yield saves
        counters = (
            ("failures", "Saves and drains that failed", status.failures),
            ("retries", "Tries of a drain that failed and were followed by another", status.retries),
            ("blocked_seconds", "Training time taken by saves and fences", status.blocked_s),
            ("written_bytes", "Bytes written where saves land", status.written_bytes),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"ckptengine_{name}", text, labels=names)
            counter.add_metric(values, value)
            yield counter
        gauges = (
            ("in_flight", "Saves that have not ended", status.in_flight),
            ("durable_age_seconds", "Since the newest durable checkpoint, or the start", status.durable_age_s),
            ("durable_step", "The newest durable step, -1 for none", _or(status.durable_step)),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"ckptengine_{name}", text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        age = GaugeMetricFamily("ckptengine_tier_age_seconds", "Since a step arrived there", labels=_TIER + names)
        newest = GaugeMetricFamily("ckptengine_tier_step", "The newest step there, -1 for none", labels=_TIER + names)
        queue = GaugeMetricFamily("ckptengine_tier_queue", "Steps on their way there", labels=_TIER + names)
        for tier in status.tiers:
            newest.add_metric([tier.label, *values], _or(tier.newest_step))
            queue.add_metric([tier.label, *values], tier.pending)
            if tier.newest_age_s is not None:
                age.add_metric([tier.label, *values], tier.newest_age_s)
        yield from (age, newest, queue)


def register(
    checkpointer: Observed, registry: CollectorRegistry = REGISTRY, labels: dict[str, str] | None = None
) -> CheckpointCollector:
    """Add a checkpointer's metrics to ``registry``, each with the constant ``labels`` (a rank, a job)."""
    collector = CheckpointCollector(checkpointer, labels)
    registry.register(collector)
    return collector


def serve(checkpointer: Observed, port: int, address: str = "127.0.0.1", labels: dict[str, str] | None = None) -> Any:
    """An endpoint of its own on ``address:port`` (0: a free port); (server, thread), ended by ``server.shutdown()``."""
    registry = CollectorRegistry()
    register(checkpointer, registry, labels)
    return start_http_server(port, addr=address, registry=registry)


def _or(step: int | None) -> int:
    return -1 if step is None else step
