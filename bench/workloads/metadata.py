"""`metadata`: what a checkpoint of many ranks and tensors costs in metadata and planning, simulated without data.

Every tensor is sharded over all ranks.  One rank of a world half as large restores it with the same kind of cut.
"""

from __future__ import annotations

import resource
from typing import Any

from ..engine import Unavailable
from ..options import Job
from ..simulated import dcp, own

SIMULATIONS = {"ckptengine": own.measure, "dcp-save": dcp.measure}
ROWS_PER_RANK = 2
COLUMNS = 64


def measure(job: Job) -> dict[str, Any]:
    """Run the job; raw figures in seconds and bytes."""
    if job.engine not in SIMULATIONS:
        raise Unavailable("not simulated: only ckptengine and torch DCP plan without data here")
    ranks, tensors = job.simulated
    names = [f"model.layers.{number // 8}.block.part_{number % 8}.weight" for number in range(tensors)]
    figures = SIMULATIONS[job.engine](ranks, names, (ranks * ROWS_PER_RANK, COLUMNS), max(1, ranks // 2))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"ranks": ranks, "tensors": tensors, "peak_bytes": peak_bytes, **figures}
