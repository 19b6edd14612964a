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
from .journal import Journal, key
from .machine import facts
from .names import OURS
from .options import Options
from .plot import draw
from .summaries import tables


def print_progress(line: str) -> None:
    """One line per job, on standard error."""
    print(line, file=sys.stderr, flush=True)


def run(options: Options, result: Path | None = None) -> dict[str, Any]:
    """Measure; the result document.

    With the file of a `result`, every finished job is kept in a journal beside it, and the jobs that an earlier run
    with the same options left there are not run again; `write` removes the journal.
    """
    header = documents.header(options, facts(Path(options.directory or tempfile.gettempdir())))
    journal = None if result is None else Journal(result, header)
    start = time.monotonic()
    if journal is None:
        samples = run_all(options, print_progress)
        earlier_s = 0.0
    else:
        earlier_s = sum(sample.wall_s for sample in journal.done.values())
        if journal.done:
            print_progress(f"going on with {journal.path.name}: {len(journal.done)} jobs are done")
        try:
            samples = run_all(options, print_progress, journal.done, journal.add, key)
        finally:
            journal.close()
    return documents.build(header if journal is None else journal.run, samples, earlier_s + time.monotonic() - start)


def show(document: documents.Document, stream: TextIO) -> None:
    """The machine, then every table."""
    print(documents.describe_machine(document), file=stream)
    for table in tables(document):
        print("\n" + table.text(), file=stream, end="")


def write(document: documents.Document, json_path: str | None, plot_path: str | None) -> None:
    """The raw samples and the pictures, where asked for."""
    if json_path is not None:
        path = Path(json_path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        temporary.replace(path)
        path.with_name(path.name + ".journal").unlink(missing_ok=True)
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
