"""From the options of one run to its document, table, JSON and pictures."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from . import document as documents
from .driver import run_all
from .machine import facts
from .names import OURS
from .options import Options
from .plot import draw
from .summaries import tables


def report_progress(stream: TextIO) -> Any:
    """One line per job on a terminal, none elsewhere."""

    def report(line: str) -> None:
        if stream.isatty():
            print(line, file=stream, flush=True)

    return report


def run(options: Options) -> dict[str, Any]:
    """Measure; the result document."""
    machine = facts(Path(options.directory or tempfile.gettempdir()))
    start = time.monotonic()
    samples = run_all(options, report_progress(sys.stderr))
    return documents.build(options, machine, samples, time.monotonic() - start)


def show(document: documents.Document, stream: TextIO) -> None:
    """The machine, then every table."""
    print(documents.describe_machine(document), file=stream)
    for table in tables(document):
        print("\n" + table.text(), file=stream, end="")


def write(document: documents.Document, json_path: str | None, plot_path: str | None) -> None:
    """The raw samples and the pictures, where asked for."""
    if json_path is not None:
        Path(json_path).write_text(json.dumps(document, separators=(",", ":")) + "\n")
    if plot_path is not None:
        draw(document, Path(plot_path))


def own_failures(document: documents.Document) -> list[str]:
    """Jobs of ckptengine itself that failed or whose bytes were wrong."""
    found = []
    for sample in document["samples"]:
        if sample["job"]["engine"] == OURS:
            text = json.dumps(sample["result"])
            if sample["result"]["status"] == "failed" or "WRONG BYTES" in text or "does not load" in text:
                found.append(sample["job"]["workload"])
    return found
