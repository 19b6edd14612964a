"""Processes for jobs without paying for their imports again and again.

One process imports torch and what every workload needs, and then forks one fresh process per job: nothing ran in it
before, no thread was started, no engine was imported.  (`python -m bench.nursery` is that process; it is told of a job
by a line on its standard input and answers with the child's process id, and later with its status and CPU seconds.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import worker


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a job's process ended."""

    status: int
    """Exit status; minus the signal where one ended it."""
    cpu_s: float
    """Of the process and of those children that it waited for."""
    cut_off: bool
    """It ran past its time limit."""


class Nursery:
    """Starts jobs, one at a time.  A context manager: at its end the forking process is gone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def run(self, folder: Path, timeout_s: float) -> Ended:
        """Run the job that `folder` describes in a forked process; every process of its group is ended afterwards."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(str(folder)).encode() + b"\n")
        self._process.stdin.flush()
        child = self._answer(None)["pid"]
        cut_off = False
        try:
            ended = self._answer(timeout_s)
            cut_off = not ended
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        ended = ended or self._answer(None)
        return Ended(ended["status"], ended["cpu_s"], cut_off)

    def _answer(self, timeout_s: float | None) -> dict[str, Any]:
        """The next line; an empty dict where the time limit came first.  Raises RuntimeError where there is none."""
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            return {}
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that starts jobs died (status {self._process.wait()})")
        found: dict[str, Any] = json.loads(line)
        return found


def run_fresh(folder: Path, timeout_s: float, environment: Mapping[str, str]) -> Ended:
    """The same in a process that was not forked: for what is measured in memory that a fork would share."""
    before = os.times()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__, str(folder / "job.json"), str(folder / "result.json")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        cut_off = False
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            cut_off = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Ended(process.returncode, cpu_s, cut_off)


def main() -> None:
    """Fork a process for every line of standard input."""
    worker.preload()
    for line in sys.stdin:
        folder = Path(json.loads(line))
        child = os.fork()
        if child == 0:
            _become_job(folder)
            return
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)  # both sides do: the id is a group's before anybody may want to end it
        _say({"pid": child})
        _, status, usage = os.wait4(child, 0)
        _say({"status": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime})


def _say(answer: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _become_job(folder: Path) -> None:
    """In the child: a process group, input and output of its own; then the job, and the interpreter's ordinary end."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    for path, flags, target in (
        (os.devnull, os.O_RDONLY, 0),
        (folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 1),
    ):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.dup2(1, 2)
    worker.main(str(folder / "job.json"), str(folder / "result.json"))


if __name__ == "__main__":
    main()
