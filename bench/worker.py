"""One job in one process: reads it as JSON from a file, writes the result as JSON to another."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from .engine import Unavailable
from .options import Job
from .rivals import engine_class


def preload() -> None:
    """Import what every job needs and no engine is: torch, its optimizers (with the compiler they drag in), DCP."""
    for name in ("torch._dynamo", "torch.optim", "torch.distributed.checkpoint", "torch.distributed.tensor"):
        importlib.import_module(name)


def without_places(text: str) -> str:
    """A traceback that does not tell where this machine keeps the package and its environment."""
    for place in (Path(__file__).resolve().parents[1], Path(sys.prefix)):
        text = text.replace(f"{place}{os.sep}", "")
    return text


def run(job: Job) -> dict[str, Any]:
    """The job's result: status "ok" with figures, "skipped" or "failed" with the reason."""
    torch.set_num_threads(job.threads)
    if job.device != "cpu" and not torch.cuda.is_available():
        return {"status": "skipped", "reason": f"no {job.device} device"}
    workload = importlib.import_module(f".workloads.{job.workload.replace('-', '_')}", __package__)
    try:
        engine = engine_class(job.engine) if job.engine else None
        figures = workload.measure(job)
    except Unavailable as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else ""
        trace = without_places(traceback.format_exc(limit=-6))
        return {"status": "failed", "reason": f"{type(error).__name__}: {detail}", "traceback": trace}
    result: dict[str, Any] = {"status": "ok", "figures": figures, "torch": torch.__version__}
    if torch.cuda.is_available():
        result["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if engine is not None:
        result["engine"] = {
            "versions": engine.versions(),
            "configuration": engine.configuration,
            "durable_by_itself": engine.durable_by_itself,
        }
    return result


def main(job_file: str, result_file: str) -> None:
    """Run the job in `job_file`; the result appears in `result_file` at once or not at all."""
    result = run(Job.from_json(json.loads(Path(job_file).read_text())))
    temporary = Path(result_file + ".tmp")
    temporary.write_text(json.dumps(result))
    temporary.rename(result_file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
