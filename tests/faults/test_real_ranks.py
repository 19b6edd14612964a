"""Two real processes under gloo with FSDP2: exact saves, a rank that dies, and one that is stopped and goes on."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ckptengine as ce

from .memory_folder import memory_folder

SCENARIOS = ("kill", "stop")
JOB = Path(__file__).with_name("rank_job.py")


class Pair:
    """Both ranks of one job, with what each of them told."""

    def __init__(self, root: Path, scenario: str) -> None:
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(JOB), str(rank), port, str(root), scenario],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip

    def told(self, rank: int, timeout_s: float = 90) -> list[dict[str, Any]]:
        output, errors = self.ranks[rank].communicate(timeout=timeout_s)
        lines = [ast.literal_eval(line) for line in output.splitlines() if line.startswith("{")]
        assert lines or self.ranks[rank].returncode < 0, errors
        return lines

    def wait_stopped(self, rank: int) -> None:
        stat = Path(f"/proc/{self.ranks[rank].pid}/stat")
        deadline_s = time.monotonic() + 90
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def end(self) -> None:
        for process in self.ranks:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    """Both scenarios at once: most of their time is imports.  Each first saves five good steps of FSDP2 training."""
    with memory_folder() as folder:
        made = {scenario: Pair(folder / scenario, scenario) for scenario in SCENARIOS}
        yield made
        for pair in made.values():
            pair.end()


def check_line(pair: Pair, told: list[dict[str, Any]]) -> None:
    assert told[0] == {"steps": [1, 2, 3, 4, 5], "wrong": []}
    assert {"hung": True} not in told
    for step in ce.steps(pair.root):
        with ce.open(pair.root, step) as checkpoint:
            checkpoint.verify()


def test_a_rank_that_dies(pairs: dict[str, Pair]) -> None:
    pair = pairs["kill"]
    told = pair.told(0)
    check_line(pair, told)
    assert told[-1]["error"] != "NoneType"
    assert told[-1]["waited_s"] < 10
    assert pair.ranks[1].wait(10) == -signal.SIGKILL
    assert ce.steps(pair.root) == [1, 2, 3, 4, 5]


def test_a_rank_that_is_stopped_beyond_the_timeout_and_goes_on(pairs: dict[str, Pair]) -> None:
    pair = pairs["stop"]
    pair.wait_stopped(1)
    assert pair.ranks[0].stdout is not None
    lines = [ast.literal_eval(pair.ranks[0].stdout.readline()) for _ in range(2)]
    assert lines[-1]["error"] == "RankTimeout"
    before = ce.steps(pair.root)
    os.kill(pair.ranks[1].pid, signal.SIGCONT)
    assert pair.ranks[0].stdin is not None
    pair.ranks[0].stdin.write("go on\n")
    pair.ranks[0].stdin.flush()
    late = pair.told(1)
    assert late[-1]["error"] != "NoneType"
    pair.ranks[0].communicate(timeout=60)
    check_line(pair, lines)
    assert before == ce.steps(pair.root) == [1, 2, 3, 4, 5]
