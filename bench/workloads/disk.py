"""`disk`: the machine's limits, without any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..disk import file_rates, memory_rates
from ..options import Job
from ..rivals.own import digest_function


def measure(job: Job) -> dict[str, Any]:
    """Run the job; rates in bytes per second."""
    rounds = []
    for _ in range(job.saves):
        rates = file_rates(Path(job.directory), job.disk_bytes)
        rates += memory_rates(min(job.disk_bytes, 256 << 20), digest_function())
        rounds.append([[rate.name, rate.bytes_per_s, rate.seconds] for rate in rates])
    return {"size_bytes": job.disk_bytes, "rounds": rounds}
