"""What a run has measured so far, on disk at once: a run that is cut off goes on where it stopped.

Beside the result `FILE` lies `FILE.journal` while the run lasts: one JSON line that describes the run, then one per
finished job.  The same command finds it and goes on; when the result is written, the journal goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ckptengine.errors import UnreadableFormat, UnusableRequest

from .driver import Sample
from .options import Job

SCHEMA = 1


def key(job: Job) -> str:
    """What tells a job from every other one of the run, whatever directory it runs in."""
    return json.dumps({name: value for name, value in job.to_json().items() if name != "directory"}, sort_keys=True)


class Journal:
    """The journal of one run; `done` are the samples that an earlier start of it left."""

    def __init__(self, result: Path, run: Mapping[str, Any]) -> None:
        """Open or create the journal beside `result`.

        Raises `UnusableRequest` where what lies there belongs to a run with other options or of another version, and
        `UnreadableFormat` where it is no journal.
        """
        self.path = result.with_name(result.name + ".journal")
        self.done: dict[str, Sample] = {}
        self.run = dict(run)
        if self.path.exists() and self.path.stat().st_size > 0:
            self._read(run["options"])
        self._stream: TextIO = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        if self._stream.tell() == 0:
            self._append(self.run)

    def _read(self, options: Mapping[str, Any]) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            self.run = json.loads(whole[0])
            found = [json.loads(line) for line in whole[1:]]
            theirs = self.run["options"], self.run["schema"]
            for one in found:
                job = Job.from_json({**one["job"], "directory": ""})
                self.done[key(job)] = Sample(job, one["result"], one["wall_s"], one["cpu_s"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UnreadableFormat(f"{self.path.name} is not the journal of a run ({error}); delete it") from error
        if theirs != (json.loads(json.dumps(dict(options))), SCHEMA):
            raise UnusableRequest(
                f"{self.path.name} was left by a run with other options; repeat those to go on with it, or delete it"
            )
        if len(whole) < len(lines):  # the machine stopped in the middle of a line
            os.truncate(self.path, sum(len(line.encode()) for line in whole))

    def add(self, sample: Sample) -> None:
        """Keep one finished job, durable when this returns."""
        self._append(sample.to_json())

    def _append(self, value: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file; it stays."""
        self._stream.close()
