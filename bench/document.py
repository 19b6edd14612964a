"""The result document: everything that was measured, as plain JSON, and the way to its summaries."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptengine.errors import UnreadableFormat

from .driver import Sample
from .options import Options

SCHEMA = 1

Document = Mapping[str, Any]


def header(options: Options, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of itself before its first job."""
    described = {name: value for name, value in dataclasses.asdict(options).items() if name != "directory"}
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "options": described,
    }


def build(header: Mapping[str, Any], samples: Iterable[Sample], seconds: float) -> dict[str, Any]:
    """The document of one run."""
    return {**header, "seconds": round(seconds, 1), "samples": [sample.to_json() for sample in samples]}


def load(path: Path) -> dict[str, Any]:
    """Read a document; raises `UnreadableFormat` where it is none."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableFormat(f"{path.name} is not a benchmark result ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise UnreadableFormat(f"{path.name} is not a benchmark result of schema {SCHEMA}")
    return document


def samples_of(document: Document, workload: str) -> list[dict[str, Any]]:
    """The samples of one workload, in the order in which they ran."""
    return [sample for sample in document["samples"] if sample["job"]["workload"] == workload]


def figures_by_engine(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Figures of the jobs that worked, by engine, in the order in which engines appear."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        if sample["result"]["status"] == "ok":
            found[sample["job"]["engine"]].append(sample["result"]["figures"])
    return dict(found)


def troubles(samples: Iterable[Mapping[str, Any]]) -> list[str]:
    """Engines that were skipped or failed, by the reason; each once."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for sample in samples:
        result = sample["result"]
        if result["status"] != "ok":
            name = sample["job"]["engine"] or sample["job"]["workload"]
            found[f"{result['status']}: {result['reason']}"][name] = None
    return [f"{', '.join(names)}: {reason}" for reason, names in found.items()]


def configurations(document: Document) -> dict[str, dict[str, Any]]:
    """How each engine was configured, and its versions."""
    found: dict[str, dict[str, Any]] = {}
    for sample in document["samples"]:
        engine = sample["result"].get("engine")
        if engine is not None:
            found.setdefault(sample["job"]["engine"], engine)
    return found


def describe_machine(document: Document) -> str:
    """The machine, the run and its device, a line each."""
    machine = document["machine"]
    system = machine["file_system"]
    return (
        f"{machine['processor']}, {machine['cores']} cores{' (virtual)' if machine['virtual'] else ''}, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, {system['type']} on {system['device']}, "
        f"Linux {machine['kernel']}, Python {machine['python']}\n"
        f"{document['date']}, size {document['options']['size']}, took {document['seconds'] / 60:.1f} minutes, "
        f"load at start {machine['load_1min']}\n{describe_devices(document)}"
    )


def describe_devices(document: Document) -> str:
    """What was measured, or not, on CUDA."""
    if document["options"]["device"] != "cpu":
        names = {name for sample in document["samples"] for name in sample["result"].get("devices", ())}
        return f"on {', '.join(sorted(names)) or document['options']['device']}"
    if document["machine"].get("cuda_devices", 0):
        return "on CPU; the CUDA devices of this machine are measured by a run of their own (--device cuda)"
    return "on CPU; stall and restore on CUDA (--device cuda) skipped: no CUDA device"
