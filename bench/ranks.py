"""Several ranks of one job: processes that find each other through a file in the job's directory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .options import Job

PARENT_PACKAGE = __package__


def launch(job: Job, phase: str, ranks: int) -> list[dict[str, Any]]:
    """Run the job's phase in `ranks` processes; their figures by rank.  Raises RuntimeError where one of them fails."""
    folder = Path(job.directory).parent / f"ranks-{phase}"
    folder.mkdir()
    todo = dataclasses.replace(job, phase=phase, ranks=ranks)
    (folder / "job.json").write_text(json.dumps(todo.to_json()))
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with open(folder / f"log-{rank}.txt", "wb") as log:
            command = [sys.executable, "-m", f"{PARENT_PACKAGE}.worker", "job.json", f"result-{rank}.json"]
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + job.timeout_s
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    results = [_result(folder, rank) for rank in range(ranks)]
    reasons = [f"rank {rank}: {one['reason']}" for rank, one in enumerate(results) if one["status"] != "ok"]
    if reasons:
        # A rank that loses its peers says so; the one that went first says why.
        raise RuntimeError(next((reason for reason in reasons if "closed by peer" not in reason), reasons[0]))
    return [result["figures"] for result in results]


def _result(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"result-{rank}.json"
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    tail = (folder / f"log-{rank}.txt").read_text(errors="replace").strip().splitlines()[-1:]
    return {"status": "failed", "reason": f"it died: {tail[0][:300] if tail else 'it printed nothing'}"}


def join_group(job: Job) -> int:
    """Become one rank of the job's phase under gloo; the rank."""
    rank = int(os.environ["RANK"])
    meeting = Path.cwd() / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=job.ranks)
    return rank
